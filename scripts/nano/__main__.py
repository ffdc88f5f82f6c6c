"""Make omni-nano, stage by stage; each goes on where it stopped, and its results are in `--output`.

python -m scripts.nano data --output work/nano
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from omni_jax.errors import InputError, OmniError
from omni_jax.process import BAD_INPUT, INTERRUPTED
from omni_jax.train.loop import Trained
from omni_jax.weights.locate import DRAFTERS, NANO
from scripts.nano.rows import SPLITS, made_senses, rows_there, write_sense
from scripts.nano.senses import senses, voices_path
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
class Trains(Made):
    """What every stage that trains by a recipe is told."""

    steps: int = tyro.MISSING
    """Steps of training."""
    learning_rate: float = tyro.MISSING
    """Highest learning rate."""
    seconds: float = 3600
    """Pause after so long, at a checkpoint; the same command goes on."""


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
    from scripts.nano.written import fetched

    known = {sense.name: sense for sense in senses(options.output, options.scale)}
    if unknown := [name for name in options.senses if name not in known]:
        raise InputError(f"there is no sense {unknown[0]!r}; the senses are {', '.join(known)}")
    asked = [known[name] for name in options.senses or known]
    needs = {need for sense in asked for need in sense.needs}
    if "voices" in needs:
        make_voices(voices_path(options.output), options.sources, options.workers)
    if "handwriting" in needs:
        fetched(options.output)
    for sense in asked:
        write_sense(options.output, sense, options.seed, options.workers)
        train, test = (rows_there(options.output, sense.name, split) for split in SPLITS)
        print(f"{sense.name}: {train:,} rows to train on, {test:,} to test", flush=True)
    return 0


@dataclass(frozen=True)
class Codec(Made):
    """Train the codec on what the two speakers say, and write the codes of all that."""

    sentences: int = 5000
    """Sentences whose words each speaker says."""
    steps: int = 2200
    """Steps of training, over which the learning rate falls."""
    seconds: float = 3600
    """Pause training after so long; the same command goes on."""


def codec(options: Annotated[Codec, tyro.conf.arg(name="")]) -> int:
    """Say the words, train, and write codes."""
    from omni_jax.config import OmniConfig
    from scripts.nano.codec_stage import CodecModules, train_codec, write_codes
    from scripts.nano.config import nano_config, nano_tokenizer
    from scripts.nano.senses import wordings
    from scripts.nano.speech import write_speech

    write_speech(options.output, options.sentences, options.seed, options.workers)
    config = OmniConfig.from_hf(nano_config(nano_tokenizer(wordings()))).code2wav
    assert config is not None
    modules = CodecModules.of(config)
    state, step = train_codec(modules, options.output, options.steps, options.seconds, options.seed)
    if step < options.steps:
        print(f"paused after step {step} of {options.steps}; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    write_codes(modules, state, options.output)
    return 0


@dataclass(frozen=True)
class Words(Trains):
    """Train the text model alone on the senses of text."""

    steps: int = 3000
    learning_rate: float = 5e-3


def words(options: Annotated[Words, tyro.conf.arg(name="")]) -> int:
    """Train, or go on."""
    from scripts.nano.thinker import train_words

    return _train(options, partial(train_words, options.output))


@dataclass(frozen=True)
class Sight(Made):
    """Train the vision encoder alone on pictures of which it is known what lies where."""

    steps: int = 7000
    """Steps of training."""
    seconds: float = 3600
    """Pause after so long; the same command goes on."""


def sight(options: Annotated[Sight, tyro.conf.arg(name="")]) -> int:
    """Train, or go on, and say what it recognises."""
    from scripts.nano.sight import tested, train_sight

    step = train_sight(options.output, options.steps, options.seconds, options.seed, options.workers)
    if step < options.steps:
        print(f"paused after step {step} of {options.steps}; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    for name, share in tested(options.output, options.seed, options.workers).items():
        print(f"{name}: {100 * share:.1f} % right in the test")
    return 0


@dataclass(frozen=True)
class Look(Trains):
    """Train text model and vision encoder on the senses of pictures."""

    steps: int = 3000
    learning_rate: float = 3e-3


def look(options: Annotated[Look, tyro.conf.arg(name="")]) -> int:
    """Train, or go on."""
    from scripts.nano.thinker import train_look

    return _train(options, partial(train_look, options.output))


@dataclass(frozen=True)
class Mixed(Trains):
    """Train the Thinker with both encoders on all senses."""

    senses: tuple[str, ...] = ()
    """Train on these alone; by default on all whose rows were made."""
    steps: int = 5_000
    learning_rate: float = 3e-3


def mixed(options: Annotated[Mixed, tyro.conf.arg(name="")]) -> int:
    """Train, or go on."""
    from scripts.nano.thinker import train_mixed

    senses = options.senses or made_senses(options.output, "train")
    return _train(options, partial(train_mixed, options.output, senses))


@dataclass(frozen=True)
class Thinker(Trains):
    """Train the Thinker on all senses to its end, on those most that it knows least."""

    senses: tuple[str, ...] = ()
    """Train on these alone; by default on all whose rows were made."""
    begun: Path | None = None
    """Model to begin with, by default that of the stage mixed; omni_jax/nano goes on from the one that there is."""
    steps: int = 4_000
    learning_rate: float = 2e-3


def thinker(options: Annotated[Thinker, tyro.conf.arg(name="")]) -> int:
    """Train, or go on."""
    from scripts.nano.thinker import train_thinker

    senses = options.senses or made_senses(options.output, "train")
    return _train(options, partial(train_thinker, options.output, senses, begun=options.begun))


@dataclass(frozen=True)
class Voice(Trains):
    """Train the Talker, with the trained codec, to speak in both voices; the stage thinker may run meanwhile."""

    steps: int = 3000
    learning_rate: float = 2e-3


def voice(options: Annotated[Voice, tyro.conf.arg(name="")]) -> int:
    """Put the Thinker of the stage mixed and the codec together, and train, or go on."""
    from scripts.nano.talker import train_voice

    return _train(options, partial(train_voice, options.output))


@dataclass(frozen=True)
class Talker(Trains):
    """Train the Talker, for the Thinker at its end, to speak its answers in both voices."""

    steps: int = 1200
    learning_rate: float = 1e-3


def talker(options: Annotated[Talker, tyro.conf.arg(name="")]) -> int:
    """Put Thinker and Talker together, train, or go on, and say how well held sentences are spoken."""
    from scripts.nano.talker import held_report, train_talker

    _train(options, partial(train_talker, options.output))
    print(held_report(options.output, options.seed))
    return 0


@dataclass(frozen=True)
class Drafters(Made):
    """Let the Thinker answer training prompts, and train a DFlash and an EAGLE-3 drafter on what it says."""

    senses: tuple[str, ...] = ()
    """Whose prompts it answers; by default all whose rows were made."""
    prompts: int = 200
    """Prompts of each sense."""
    steps: int = 1500
    """Steps of training, of each drafter."""


def drafters(options: Annotated[Drafters, tyro.conf.arg(name="")]) -> int:
    """Answer, train, or go on."""
    from scripts.nano.drafters import train_drafters, write_replies

    output, seed = options.output, options.seed
    replies = write_replies(output, options.senses or made_senses(output, "train"), options.prompts, seed)
    for name, trained in train_drafters(output, replies, options.steps, seed, options.workers).items():
        print(f"{name}: {_line(trained)}")
    return 0


@dataclass(frozen=True)
class Export(Made):
    """Write the trained model and its drafters as Hugging Face directories, into the package."""

    package: Path = NANO
    """Directory that is replaced by them."""
    without_drafters: bool = False
    """Leave out drafters that were not trained here, those that the package holds already too."""


def export(options: Annotated[Export, tyro.conf.arg(name="")]) -> int:
    """Write what was trained last."""
    from scripts.nano.export import export_nano, shipped_drafters, trained_drafters, trained_model

    shipped = {} if options.without_drafters else shipped_drafters(options.package)
    drafters = shipped | trained_drafters(options.output)
    for name, size in export_nano(trained_model(options.output), drafters, options.package).items():
        print(f"{name}: {size:,} bytes of weights in {options.package}")
    for kind in (kind for kind in DRAFTERS if kind not in drafters):
        print(f"{kind}: not there; the stage drafters makes it")
    return 0


@dataclass(frozen=True)
class Evaluate(Made):
    """Ask a model all that the tests ask, and judge its answers."""

    model: Path = tyro.MISSING
    """What is evaluated, in any form that `omni_jax.load` takes; "nano" is the exported one."""
    senses: tuple[str, ...] = ()
    """Ask these alone, and nothing else; by default all whose rows were made, then robustness and speech."""
    limit: int | None = None
    """The most rows of each sense."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type in which weights are held; int8: routed experts alone."""


def evaluate(options: Annotated[Evaluate, tyro.conf.arg(name="")]) -> int:
    """Ask what this model has no replies to yet, and print all results."""
    from scripts.nano.ablation import evaluate_ablations
    from scripts.nano.evaluation import Evaluator, evaluate_sense, line_of
    from scripts.nano.robustness import evaluate_robustness
    from scripts.nano.spoken import check_speech, evaluate_held, evaluate_speech, speech_lines

    if not options.senses:
        check_speech(options.model, options.output)
    evaluator = Evaluator(options.model, options.output, options.limit, options.dtype, speaks=not options.senses)
    for sense in options.senses or made_senses(options.output, "test"):
        print(line_of(sense, evaluate_sense(evaluator, options.output, sense)), flush=True)
    if options.senses:
        return 0
    changed = evaluate_robustness(evaluator, options.output) | evaluate_ablations(evaluator, options.output)
    print("\n".join(line_of(name, results) for name, results in changed.items()), flush=True)
    print("\n".join(speech_lines(evaluate_speech(evaluator, options.output))), flush=True)
    print(evaluate_held(options.output, options.seed) or "no Talker was trained here")
    return 0


@dataclass(frozen=True)
class Prompts(Made):
    """Write test prompts on which drafters are compared; the card has the commands."""

    count: int = 80
    """Prompts of text, and as many with media."""


def prompts(options: Annotated[Prompts, tyro.conf.arg(name="")]) -> int:
    """Write them."""
    from scripts.nano.prompts import write_prompts

    for name, number in write_prompts(options.output, options.count).items():
        print(f"{number} prompts in {options.output}/prompts/{name}.jsonl")
    return 0


@dataclass(frozen=True)
class Examples(Made):
    """Write a few test rows that the repository keeps."""

    examples: Path = Path("tests/data/nano")
    """Where they are written."""


def examples(options: Annotated[Examples, tyro.conf.arg(name="")]) -> int:
    """Write them."""
    from scripts.nano.examples import write_examples

    for sense, number in write_examples(options.output, options.examples, options.seed).items():
        print(f"{sense}: {number} examples in {options.examples}")
    return 0


@dataclass(frozen=True)
class Card(Made):
    """Write the model card from the results of the other stages."""

    model: Path = tyro.MISSING
    """The model that was evaluated."""
    docs: Path = Path("docs")
    """Where nano.md and the folder nano are written."""


def card(options: Annotated[Card, tyro.conf.arg(name="")]) -> int:
    """Write the card, its plots and its sounds."""
    from scripts.nano.card import write_card

    print(write_card(options.output, options.model, options.docs, options.seed))
    return 0


def _train(options: Trains, train: Callable[[Any], Trained]) -> int:
    """Train as the options say, and print what came of it."""
    from scripts.nano.pausing import paused_after
    from scripts.nano.thinker import How

    how = How(options.steps, options.learning_rate, options.seed, options.workers)
    with paused_after(options.seconds):
        trained = train(how)
    print(_line(trained))
    return 0


def _line(trained: Trained) -> str:
    return f"{trained.steps} steps, loss {trained.loss:.4g}: {trained.model}"


def main() -> int:
    """Run the stage of the command line: its status."""
    making = data, words, sight, look, mixed, thinker, codec, voice, talker, drafters
    using = export, evaluate, prompts, examples, card
    try:
        commands = {stage.__name__: stage for stage in (*making, *using)}
        return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m scripts.nano", description=__doc__)
    except OmniError as error:
        print(f"scripts.nano: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("scripts.nano: paused; the same command goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
