"""Make omni-nano, stage by stage; each goes on where it stopped, and its results are in `--output`.

python -m scripts.nano data --output work/nano
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from scripts.nano.hear import hear_senses
from scripts.nano.rows import write_sense
from scripts.nano.synthesis import Sources, make_voices
from scripts.nano.text import text_senses


@dataclass(frozen=True)
class Made:
    """What every stage is told."""

    output: Path = Path("work/nano")
    """Directory of all stages."""
    seed: int = 0
    """Of everything that is drawn."""
    workers: int = 2
    """Processes that make data."""


@dataclass(frozen=True)
class Data(Made):
    """Make the rows of all senses, training and test."""

    scale: float = 1.0
    """Of the numbers of rows."""
    senses: tuple[str, ...] = ()
    """Make these alone."""
    sources: tyro.conf.OmitArgPrefixes[Sources] = field(default_factory=Sources)


def data(options: Annotated[Data, tyro.conf.arg(name="")]) -> int:
    """Make the rows that are not there yet."""
    voices = options.output / "voices"
    heard = hear_senses(voices, options.scale)
    if not options.senses or {sense.name for sense in heard} & {*options.senses}:
        make_voices(voices, options.sources, options.workers)
    for sense in (*text_senses(options.scale), *heard):
        if not options.senses or sense.name in options.senses:
            write_sense(options.output, sense, options.seed, options.workers)
            print(f"{sense.name}: {sense.counts['train']} rows to train on, {sense.counts['test']} to test", flush=True)
    return 0


if __name__ == "__main__":
    commands = {"data": data}
    sys.exit(tyro.extras.subcommand_cli_from_dict(commands, prog="python -m scripts.nano", description=__doc__))
