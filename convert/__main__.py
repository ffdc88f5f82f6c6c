"""Command line of the converter: `python -m convert SRC DST`, `--reverse DST SRC`, `--verify DST`, `--dry-run SRC`.

Exit status: 0 done; 1 a bug, with its traceback; 2 wrong usage; 3 an input that cannot be used, or a report that could
not be written; 4 data that differs from what was written; 130 interrupted, and nothing is left over; 141 the reader of
the report closed it before its end.
"""

if __name__ == "__main__":
    # Here rather than below the imports: an interrupt may fall into them too.
    import os

    from omni_jax.process import enter

    os.environ["JAX_PLATFORMS"] = "cpu"  # Converting needs no accelerator; do not take its memory.
    enter("python -m convert", "convert.__main__")

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omni_jax.errors import MismatchError, OmniError
from omni_jax.files import reason_of, user_path
from omni_jax.process import BAD_INPUT, lacks_memory

USAGE, MISMATCH = 2, 4
UNCOMPARED = "small files such as config.json; a checkpoint of the first format has no hashes of them"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Options that each way of running the command has no use for. --dry-run can be added to any conversion.
UNUSED = {
    "convert": ("config", "shard_size"),
    "dry_run": ("shard_size",),
    "reverse": ("parts", "dtype", "quantize", "allow_nonfinite", "config"),
    "verify": ("parts", "dtype", "quantize", "allow_nonfinite", "config", "overwrite", "shard_size"),
}


@dataclass(frozen=True)
class Arguments:
    """Convert a Hugging Face Qwen3-Omni checkpoint to a sharded Orbax checkpoint, back, or check one.

    To convert: `python -m convert SRC DST`

    Back to safetensors, bit for bit: `python -m convert --reverse DST SRC`

    Compare every tensor and file with its stored SHA-256: `python -m convert --verify DST`

    Read headers only, or a JSON manifest of names and shapes: `python -m convert --dry-run SRC`
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Source (a directory or a model id) and destination; one path for --verify alone and for --dry-run."""
    reverse: bool = False
    """Write a converted checkpoint back as safetensors."""
    verify: bool = False
    """Read everything back and compare hashes: after converting, or alone on a converted checkpoint."""
    dry_run: bool = False
    """Only check that every tensor has its place; writes nothing."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast while converting; default: as in the source."""
    quantize: Literal["int8"] | None = None
    """Store the routed experts in eight bits; default: as in the source."""
    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART ...")] = ()
    """Sub-models to convert (thinker, talker, code2wav); default: all."""
    config: Path | None = None
    """For --dry-run on a manifest: the config.json, unless it is in the same directory."""
    shard_size: str = "5G"
    """For --reverse: most bytes in a file, such as 500M or 5G."""
    overwrite: bool = False
    """Replace the destination if it is a converted checkpoint."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""
    json: bool = False
    """Print the result as JSON, and no progress bar."""


def run(arguments: Arguments) -> dict:
    """Do what the arguments say and return what there is to report."""
    # Imported where an option has been understood, so that --help is quick.
    from convert import convert_checkpoint, reverse_checkpoint, verify_checkpoint
    from omni_jax.weights.manifest import read_manifest

    paths, progress = [user_path(path, "the path") for path in arguments.paths], not arguments.json
    if arguments.dry_run:
        return _dry_run(paths[0], arguments)
    if arguments.reverse:
        count = reverse_checkpoint(paths[0], paths[1], _bytes(arguments.shard_size), progress, arguments.overwrite)
        return {"tensors": count, "destination": str(paths[1])}
    if len(paths) == 1:
        report = {"verified": verify_checkpoint(paths[0], progress), "checkpoint": str(paths[0])}
        return report if read_manifest(paths[0]).files else report | {"not_compared": UNCOMPARED}
    manifest = convert_checkpoint(
        paths[0],
        paths[1],
        parts=arguments.parts or None,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        overwrite=arguments.overwrite,
        allow_nonfinite=arguments.allow_nonfinite,
        verify=arguments.verify,
        progress=progress,
    )
    tensors = sum(len(leaf.sha256) for leaf in manifest.leaves.values())
    return {"tensors": tensors, "arrays": len(manifest.leaves), "destination": str(paths[1])}


def _dry_run(path: Path, arguments: Arguments) -> dict:
    from omni_jax.weights.hf import as_asked
    from omni_jax.weights.locate import locate
    from omni_jax.weights.plan import plan_weights
    from omni_jax.weights.safetensors import open_checkpoint, open_manifest

    # A manifest is a JSON file; any other name is that of a checkpoint.
    is_manifest = path.is_file() or path.name.endswith((".json", ".json.gz"))
    source = open_manifest(path, arguments.config) if is_manifest else open_checkpoint(locate(path, "the source"))
    asked = as_asked(source, arguments.dtype, arguments.quantize)
    planned = plan_weights(asked, arguments.parts or None, arguments.dtype)
    name, size = planned.largest
    return {
        "tensors": planned.tensors,
        "parameters": planned.parameters,
        "arrays": len(planned.leaves),
        "bytes": planned.bytes,
        "largest_array": name,
        "largest_array_bytes": size,
        "missing": 0,
        "left_over": 0,
    }


def _problem(arguments: Arguments) -> str | None:
    """What is wrong with a combination of arguments of which each is valid."""
    modes = sum((arguments.reverse, arguments.dry_run, arguments.verify and len(arguments.paths) == 1))
    if modes > 1 or (arguments.reverse and arguments.verify):
        return "choose one of --reverse, --dry-run and --verify (--reverse always compares hashes)"
    single = modes and not arguments.reverse
    if single and not (arguments.dry_run and len(arguments.paths) == 2) and len(arguments.paths) != 1:
        return "expected one path"
    if not single and len(arguments.paths) != 2:
        return "expected two paths, source and destination"
    mode = "dry_run" if arguments.dry_run else "reverse" if arguments.reverse else "verify" if modes else "convert"
    for name in UNUSED[mode]:
        if getattr(arguments, name) != getattr(Arguments, name):
            return f"--{name.replace('_', '-')} is of no use here; leave it out"
    try:
        _bytes(arguments.shard_size)
    except (ValueError, OverflowError):
        return f"--shard-size {arguments.shard_size!r}: write it like 500M or 5G"
    return None


def _bytes(text: str) -> int:
    """'5G' or '5GB' -> 5,000,000,000."""
    number = text.upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in UNITS else ""
    size = int(float(number.removesuffix(unit)) * UNITS[unit])
    if size < 1:
        raise ValueError(text)
    return size


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print; return the exit status."""
    arguments = tyro.cli(Arguments, prog="python -m convert", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    if problem := _problem(arguments):
        print(f"error: {problem}; see --help", file=sys.stderr)
        return USAGE
    try:
        report = run(arguments)
    except (OmniError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISMATCH if isinstance(error, MismatchError) else BAD_INPUT
    except Exception as error:
        if not lacks_memory(error):
            raise
        print(f"error: there is too little memory ({reason_of(error)}); end other programs first", file=sys.stderr)
        return BAD_INPUT
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return 0
