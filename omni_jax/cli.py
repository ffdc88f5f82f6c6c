"""The `omni-jax` command: generate, stream, inspect, evaluate, train and serve.

Answers go to stdout, everything else to stderr. With `--json` stdout holds JSON only: one object, or for `stream` one
per line. Exit status: 0 done; 1 a bug, with its traceback; 2 wrong usage; 3 bad input or checkpoint, too little memory,
or an answer that could not be written; 4 evaluated, but not all rows could be scored; 130 interrupted; 141 the reader
of the answer closed it before its end, as `head` may.
"""

if __name__ == "__main__":
    # Before the imports, which take time: an interrupt may come during them too.
    from omni_jax.process import enter

    enter("omni-jax", "omni_jax.cli")

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from omni_jax import process
from omni_jax.ask import Generate, Stream, answer
from omni_jax.distributed import START_SECONDS, Machines, is_primary
from omni_jax.errors import OmniError
from omni_jax.evaluate.command import Evaluate, evaluate
from omni_jax.evaluate.report import all_scored
from omni_jax.files import reason_of
from omni_jax.flags import expand_paths
from omni_jax.inspection import Inspect, inspect
from omni_jax.omni import Omni
from omni_jax.printing import report_mesh
from omni_jax.serve.command import Serve, serve
from omni_jax.sharding import platform
from omni_jax.train.codes_command import CheckCodes
from omni_jax.train.command import Plot, Train, configured, run_command
from omni_jax.train.drafters.questions import Regenerate
from omni_jax.train.export import Export
from omni_jax.weights.locate import locate

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Stream, tyro.conf.subcommand("stream")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
)


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's own); SystemExit with its status unless all went well."""
    try:
        _run(expand_paths(_parsed(args)))
    except OmniError as error:
        print(f"omni-jax: {error}", file=sys.stderr)
        sys.exit(process.BAD_INPUT)
    except Exception as error:
        if not process.lacks_memory(error):
            raise
        remedy = "lower --max-new-tokens, send smaller media, take --dtype bfloat16, or spread the model with --mesh"
        print(f"omni-jax: there is too little memory ({reason_of(error)}); {remedy}", file=sys.stderr)
        sys.exit(process.BAD_INPUT)


def _parsed(args: list[str] | None) -> Command:
    """The command that a command line states; what it leaves open is as in the file that --config names."""
    stated = configured(sys.argv[1:] if args is None else args)
    return tyro.cli(
        Command,
        prog="omni-jax",
        description=__doc__,
        args=args,
        default=tyro.MISSING if stated is None else stated,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _run(command: Command) -> None:
    if isinstance(command, Train):
        return _train(command)
    if isinstance(command, Serve):
        command = command.named()
    command = replace(command, model=locate(command.model))
    if isinstance(command, Inspect):
        return inspect(command)
    _join(command.devices)
    platform()  # Before anything is read: are there such devices?
    if isinstance(command, Evaluate):
        _evaluate(command)
    elif isinstance(command, Serve):
        serve(command, _loader(command))
    else:
        answer(command)


def _join(machines: Machines) -> None:
    """Join the other processes, if there are any; then only the first one answers.

    What libraries write to standard output goes to stderr.
    """
    if not machines.distributed:
        return machines.join()
    answers = os.dup(sys.stdout.fileno())
    # Joining already connects the processes, which XLA reports on standard output.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(f"joining the other processes, for which this one waits {START_SECONDS} s at most", file=sys.stderr)
    machines.join()
    if not is_primary():
        os.dup2(os.open(os.devnull, os.O_WRONLY), answers)
    process.answer_on(answers)


def _train(command: Train) -> None:
    import omni_jax

    def load(model: Path, parts: tuple[str, ...], mesh: str | None) -> Omni:
        print(f"loading {model}", file=sys.stderr)
        omni = omni_jax.load(model, mesh=mesh, parts=parts)
        report_mesh(omni)
        return omni

    match command.recipe:
        case Plot():
            pass
        case Regenerate() | CheckCodes() | Export() as asked:
            _join(asked.devices)
        case recipe:
            _join(recipe.compute)
    if not isinstance(command.recipe, Plot):
        platform()
    process.end_on_terminate()
    run_command(command, load)


def _loader(command: Evaluate | Serve) -> Callable[[tuple[str, ...] | None], Omni]:
    """What loads the model of a command with these parts, all by default."""
    import omni_jax

    def load(parts: tuple[str, ...] | None) -> Omni:
        print(f"loading {command.model}", file=sys.stderr)
        omni = omni_jax.load(
            command.model,
            mesh=command.devices.mesh,
            dtype=command.devices.dtype,
            parts=parts,
            adapter=command.adapter,
            quantize=command.devices.quantize,
        )
        report_mesh(omni)
        return omni

    return load


def _evaluate(command: Evaluate) -> None:
    summary = evaluate(command, _loader(command))
    if is_primary():
        print(json.dumps(summary) if command.json else (command.output / "report.md").read_text("utf-8"))
    if not all_scored(summary):
        sys.exit(process.UNSCORED)
