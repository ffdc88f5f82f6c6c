"""Make omni-nano, stage by stage; each goes on where it stopped, and its results are in `--output`.

python -m scripts.nano data --output work/nano
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from scripts.nano.rows import write_sense
from scripts.nano.senses import SPOKEN, senses, voices_path
from scripts.nano.synthesis import Sources, make_voices


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
    asked = [sense for sense in senses(options.output, options.scale) if sense.name in (options.senses or [sense.name])]
    if any(sense.name in SPOKEN for sense in asked):
        make_voices(voices_path(options.output), options.sources, options.workers)
    for sense in asked:
        write_sense(options.output, sense, options.seed, options.workers)
        print(f"{sense.name}: {sense.counts['train']} rows to train on, {sense.counts['test']} to test", flush=True)
    return 0


@dataclass(frozen=True)
class Codec(Made):
    """Train the codec on what the two speakers say, and write the codes of all that."""

    sentences: int = 3000
    """Sentences that each speaker says."""
    steps: int = 4000
    """The most steps of training."""
    seconds: float = 3600
    """The most seconds of training, all runs together."""


def codec(options: Annotated[Codec, tyro.conf.arg(name="")]) -> int:
    """Speak the sentences, train, and write codes."""
    from omni_jax.config import OmniConfig
    from scripts.nano.codec_stage import Codec as Parts
    from scripts.nano.codec_stage import train_codec, write_codes
    from scripts.nano.config import nano_config, nano_tokenizer
    from scripts.nano.senses import wordings
    from scripts.nano.speech import write_speech

    speech = write_speech(options.output, options.sentences, options.seed, options.workers).parent
    config = OmniConfig.from_hf(nano_config(nano_tokenizer(wordings()))).code2wav
    assert config is not None
    parts = Parts.of(config)
    state = train_codec(parts, speech, options.output, options.steps, options.seconds, options.seed)
    write_codes(parts, state, speech)
    return 0


@dataclass(frozen=True)
class Thinker(Made):
    """Train the Thinker with both encoders on all senses."""

    senses: tuple[str, ...] = ()
    """Train on these alone; by default on all whose rows were made."""
    steps: int = 6000
    """Steps of training."""
    learning_rate: float = 2e-3
    """Highest learning rate."""


def thinker(options: Annotated[Thinker, tyro.conf.arg(name="")]) -> int:
    """Train, or go on."""
    from scripts.nano.thinker import train_thinker

    senses, rate = options.senses or made_senses(options.output), options.learning_rate
    trained = train_thinker(options.output, senses, options.steps, rate, options.seed, options.workers)
    print(f"{trained.steps} steps, loss {trained.loss:.4g}: {trained.model}")
    return 0


@dataclass(frozen=True)
class Talker(Made):
    """Train the Talker, with the trained codec, to speak the Thinker's answers in both voices."""

    steps: int = 6000
    """Steps of training."""
    learning_rate: float = 2e-3
    """Highest learning rate."""


def talker(options: Annotated[Talker, tyro.conf.arg(name="")]) -> int:
    """Put Thinker and codec together, train, or go on, and say how well held sentences are spoken."""
    from scripts.nano.talker import held_report, train_talker

    trained = train_talker(options.output, options.steps, options.learning_rate, options.seed, options.workers)
    print(f"{trained.steps} steps, loss {trained.loss:.4g}: {trained.model}")
    print(held_report(options.output, options.seed))
    return 0


@dataclass(frozen=True)
class Drafters(Made):
    """Let the Thinker answer training prompts, and train a DFlash and an EAGLE-3 drafter on what it says."""

    senses: tuple[str, ...] = ()
    """Whose prompts it answers; by default all whose rows were made."""
    prompts: int = 300
    """Prompts of each sense."""
    steps: int = 1500
    """Steps of training, of each drafter."""


def drafters(options: Annotated[Drafters, tyro.conf.arg(name="")]) -> int:
    """Answer, train, or go on."""
    from scripts.nano.drafters import train_drafters, write_replies

    output, seed = options.output, options.seed
    replies = write_replies(output, options.senses or made_senses(output), options.prompts, seed)
    for name, trained in train_drafters(output, replies, options.steps, seed, options.workers).items():
        print(f"{name}: {trained.steps} steps, loss {trained.loss:.4g}: {trained.model}")
    return 0


def made_senses(directory: Path) -> list[str]:
    """The senses whose training rows were made."""
    return sorted(file.name.split(".")[0] for file in directory.glob("rows/*.train.jsonl"))


if __name__ == "__main__":
    commands = {"data": data, "thinker": thinker, "codec": codec, "talker": talker, "drafters": drafters}
    sys.exit(tyro.extras.subcommand_cli_from_dict(commands, prog="python -m scripts.nano", description=__doc__))
