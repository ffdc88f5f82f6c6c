"""The stage card: docs/nano.md, its figures and plots, from what the other stages left.

    figures.figures_of -> docs/nano/figures.json -> card.md filled in -> docs/nano.md
    metrics of stages -> docs/nano/loss-<stage>.png;  evaluation/<model>-float32/*.wav -> docs/nano/*.wav

The text follows from card.md and figures.json alone, so that a test can compare it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shutil import copyfile
from string import Template
from typing import Any

from omni_jax.files import write_whole
from omni_jax.weights.locate import DRAFTERS
from scripts.nano.evaluation import Evaluator, by_origin, interval_of
from scripts.nano.figures import NARROW, STAGES, Figures, curve, figures_of
from scripts.nano.robustness import PHOTOGRAPHS, conditions
from scripts.nano.speech import VOICES
from scripts.nano.spoken import share
from scripts.nano.words import DIGITS

TEMPLATE = Path(__file__).with_name("card.md")
FIGURES = "figures.json"
# Accuracy under other conditions, what narrower weights may lose, numbers heard, words misheard.
ROBUST, LOST, UNDERSTOOD, MISUNDERSTOOD = 0.85, 0.01, 0.9, 0.2
# Sounds without a voice, by the names of their files.
SOUNDS = ("silence", "noise", "beep", "music")
# What speech is compared with.
COMPARED = {
    "said": "omni-nano",
    "new": "of these, sentences that the stage codec has not listed",
    "synthesised": "the synthesiser",
    "another": "omni-nano, against another sentence",
    "shuffled": "omni-nano, pieces in a random order",
}

# The parts without which the model is asked.
REMOVED = {
    "deepstack": "deepstack: what the vision encoder's middle layers add to the Thinker's first layers",
    "time": "temporal positions: a second of video counts a tenth of a position, not thirteen",
    "routing": "the right experts: in one layer, two of them get each other's tokens",
    "window": "windows of two chunks in the audio encoder: each chunk of a second is heard by itself",
}


@dataclass(frozen=True)
class Goal:
    """What a sense is asked, and the share of right answers that it should reach.

    sounds: of the rows about sounds without a voice, those that count, by the names of their files; "voices" are all
    others. None: all rows count.
    """

    kind: str
    asked: str
    sense: str
    least: float
    sounds: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """What the card calls it."""
        return self.sense if self.sounds is None else f"{self.sense} ({', '.join(self.sounds)})"

    def of(self, results: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Those of a sense's results that count."""
        if results is None or self.sounds is None:
            return results
        counted = {name: n for name, n in results["voices"].items() if self._counts(name)}
        right, samples = (sum(n[i] for n in counted.values()) for i in (0, 1))
        return {"right": right, "samples": samples, "voices": counted}

    def _counts(self, name: str) -> bool:
        assert self.sounds is not None
        return name in self.sounds or "voices" in self.sounds and name not in SOUNDS


GOALS = (
    Goal("hear", "one spoken digit, of voices never trained on", "digit", 0.95),
    Goal("hear", "strings of two to five digits, all in order", "digits", 0.85),
    Goal("hear", "silence and noise are said to be that", "silence", 0.85, ("silence", "noise")),
    Goal(
        "hear", "a beep, of pitches never trained on, or music is said to be that", "silence", 0.85, ("beep", "music")
    ),
    Goal("hear", "a voice among such sounds, and its digit", "silence", 0.85, ("voices",)),
    Goal("see", "one handwritten digit, of a collection never trained on", "written", 0.95),
    Goal("see", "scenes: colour, shape, number and place", "scene", 0.95),
    Goal("see", "several pictures compared", "compare", 0.95),
    Goal("read", "words of one to three syllables, in fonts never trained on", "read", 0.9),
    Goal("watch", "which way a thing moves, or which thing does", "move", 0.9),
    Goal("watch", "after how many seconds it appears", "when", 0.9),
    Goal("watch and listen", "which came first, the flash or the beep", "flash", 0.9),
    Goal("watch and listen", "the digit said while the square is red", "red", 0.9),
    Goal("both", "is the written digit the one that is said?", "same", 0.95),
    Goal("remember", "a word told in an earlier turn", "remember", 0.95),
    Goal("remember", "a digit heard in an earlier turn", "heard", 0.95),
    Goal("remember", "a digit or a thing shown in an earlier turn", "shown", 0.95),
    Goal("text", "counting", "count", 0.95),
    Goal("text", "adding up to 20", "add", 0.95),
    Goal("text", "spelling", "spell", 0.95),
    Goal("text", "repeating a phrase", "repeat", 0.95),
)

SENSES = tuple(dict.fromkeys(goal.sense for goal in GOALS))


def write_card(output: Path, model: Path, docs: Path, seed: int) -> Path:
    """Write the card, its figures, plots and sounds into `docs`: the card. InputError without results of a sense."""
    figures, kept = figures_of(output, model, seed), Evaluator(model, output).folder
    (docs / "nano").mkdir(parents=True, exist_ok=True)
    for stage in figures["stages"]:
        _draw(docs / "nano" / f"loss-{stage}.png", *curve(output, stage))
    for example in figures["speech"]["examples"]:
        copyfile(kept / example["file"], docs / "nano" / example["file"])
    write_whole(docs / "nano" / FIGURES, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_whole(docs / "nano.md", text_of(figures))
    return docs / "nano.md"


def _draw(path: Path, steps: Sequence[float], losses: Sequence[float]) -> None:
    """Draw a loss over the steps, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure, picture = Figure(figsize=(5, 2.6), layout="constrained"), BytesIO()
    axes = figure.subplots()
    axes.semilogy(steps, losses, linewidth=0.9)
    axes.set(xlabel="Step", ylabel="Loss")
    axes.grid(alpha=0.3)
    figure.savefig(picture, format="png", dpi=110)
    write_whole(path, picture.getvalue())


def text_of(figures: Figures) -> str:
    """The card of some figures."""
    return Template(TEMPLATE.read_text()).substitute(
        parameters=f"{figures['sizes']['model']['parameters'] / 1e6:.1f} million",
        sizes=_sizes(figures["sizes"]),
        goals=_goals(figures),
        short=_short(figures),
        origins=_origins(figures["senses"]),
        voices=_voices(figures["senses"]),
        confusion=_confusions(figures["senses"]),
        robust=_robust(figures["robust"]),
        without=_without(figures),
        recogniser=figures["speech"]["recogniser"],
        speech=_speech(figures["speech"]),
        talker=figures["talker"] or "Not measured.",
        examples=_examples(figures["speech"]),
        failures=_failures(figures["senses"]),
        stages=_stages(figures["stages"]),
        evaluated=_minutes(figures["evaluated"]),
        seed=figures["seed"],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _whole(value: float) -> str:
    return f"{100 * value:.0f} %"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}"


def _within(results: Mapping[str, Any]) -> str:
    low, high = interval_of(results)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _right(results: Mapping[str, Any]) -> float:
    return share(results, "right", "samples")


def _sizes(sizes: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        (name, *(f"{one[what]:,}" if what in one else "" for what in ("parameters", "bytes")))
        for name, one in sizes.items()
    ]
    return _table(("part or drafter", "parameters", "bytes of files"), rows)


def _goals(figures: Figures) -> str:
    head = ("", "asked", "name", "goal", "right", "interval", *NARROW.values(), "word for word", "samples")
    rows = []
    for goal in GOALS:
        asked = goal.kind, goal.asked, goal.sense, _whole(goal.least)
        if (one := goal.of(figures["senses"].get(goal.sense))) is None:
            rows.append((*asked, "not measured", *[""] * (len(head) - 5)))
            continue
        narrow = (_percent(_right(held)) if (held := goal.of(figures[name].get(goal.sense))) else "" for name in NARROW)
        verbatim = _percent(share(one, "verbatim", "samples")) if "verbatim" in one else ""
        measured = _percent(_right(one)), _within(one), *narrow, verbatim, one["samples"]
        rows.append((*asked, *measured))
    return _table(head, rows)


def _short(figures: Figures) -> str:
    """What falls short of its goal, and what was not measured, in words."""
    behind, missing = _behind(figures), _missing(figures)
    if behind:
        first = f"Short of its goal: {', '.join(behind)}."
    elif missing:
        first = "What was measured reaches its goal, but not everything was measured."
    else:
        first = "Everything reaches its goal."
    return "\n".join([first, *([f"Not measured: {', '.join(missing)}."] if missing else [])])


def _behind(figures: Figures) -> list[str]:
    """What falls short of its goal."""
    senses = figures["senses"]
    asked = [(goal.name, one, goal.least) for goal in GOALS if (one := goal.of(senses.get(goal.sense))) is not None]
    asked += [(name, one, ROBUST) for name, one in figures["robust"].items()]
    behind = [
        f"{name} ({_percent(_right(one))} of {_whole(least)})" for name, one, least in asked if _right(one) < least
    ]
    for held in NARROW:
        for name in (name for name in figures[held] if name in senses):
            if (lost := round(_right(senses[name]) - _right(figures[held][name]), 6)) > LOST:
                behind.append(f"{name} in {held} (loses {100 * lost:.1f} points of {100 * LOST:.0f})")
    for speaker, one in figures["speech"]["speakers"].items():
        numbers, words = share(one["said"], "numbers_heard", "numbers"), share(one["said"], "errors", "words")
        if numbers < UNDERSTOOD or words > MISUNDERSTOOD:
            told = f"{_percent(numbers)} of numbers heard, {_percent(words)} of words wrong"
            behind.append(f"{speaker}'s speech ({told})")
    return behind


def _missing(figures: Figures) -> list[str]:
    """What was not measured."""
    senses, *narrow = ([sense for sense in SENSES if sense not in figures[name]] for name in ("senses", *NARROW))
    missing = [*senses, *(name for name in (*conditions(), PHOTOGRAPHS) if name not in figures["robust"])]
    missing += [f"the model without {name}" for name in REMOVED if name not in figures["without"]]
    missing += [f"{speaker}'s speech" for speaker in VOICES if speaker not in figures["speech"]["speakers"]]
    for held, lacking in zip(NARROW, narrow, strict=True):
        if lacking:
            missing.append(f"{', '.join(lacking) if len(lacking) < len(SENSES) else 'anything'} in {held}")
    missing += ["the Talker's held sentences"] * (figures["talker"] is None)
    missing += [f"the size of {kind}" for kind in DRAFTERS if kind not in figures["sizes"]]
    return missing + [f"the training of {stage}" for stage in STAGES if stage not in figures["stages"]]


def _origins(senses: Mapping[str, Any]) -> str:
    """Accuracy on recorded people and on synthetic voices, of the senses that tell voices."""
    rows = []
    for name, one in senses.items():
        for origin, (right, number) in by_origin(one.get("voices", {})).items():
            voices = {voice: count for voice, count in one["voices"].items() if origin in by_origin({voice: count})}
            results = {"right": right, "samples": number, "voices": voices}
            rows.append((name, origin, _percent(right / number), _within(results), number, len(voices)))
    return _table(("sense", "said by", "right", "interval", "samples", "voices"), rows) if rows else ""


def _voices(senses: Mapping[str, Any]) -> str:
    """Accuracy by voice of the senses that tell it."""
    told = {name: one["voices"] for name, one in senses.items() if "voices" in one}
    names = sorted({voice for voices in told.values() for voice in voices})

    def cell(count: list[int] | None) -> str:
        return "" if count is None else f"{count[0]} of {count[1]}"

    rows = [(name, *(cell(voices.get(name)) for voices in told.values())) for name in names]
    return _table(("right, by voice or sound", *told), rows) if told else ""


def _confusions(senses: Mapping[str, Any]) -> str:
    parts = []
    for sense, one in senses.items():
        if "confusion" in one:
            head = (f"**{sense}**", *map(str, range(10)), "none")
            rows = [(f"{i} {DIGITS[i]}", *(n or "" for n in row)) for i, row in enumerate(one["confusion"])]
            parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _robust(results: Mapping[str, Any]) -> str:
    rows = [(name, _percent(_right(one)), _within(one), one["samples"]) for name, one in results.items()]
    return _table(("condition", "right", "interval", "samples"), rows) if rows else "Not measured."


def _without(figures: Figures) -> str:
    rows = [
        (REMOVED[name], one["sense"], _percent(_right(figures["senses"][one["sense"]])), _percent(_right(one)))
        for name, one in figures["without"].items()
        if one["sense"] in figures["senses"]
    ]
    return _table(("without", "asked", "right with it", "right without"), rows) if rows else "Not measured."


def _speech(speech: Mapping[str, Any]) -> str:
    rows = []
    for speaker, one in speech["speakers"].items():
        for name, what in COMPARED.items():
            counts = one[name]
            pairs = (("numbers_heard", "numbers"), ("errors", "words"), ("strings_right", "strings"))
            figures = [_percent(share(counts, *pair)) if counts[pair[1]] else "" for pair in pairs]
            rows.append((speaker, what, *figures, counts["sentences"], counts["strings"], counts["words"]))
    measured = ("numbers heard", "word error", "all numbers of a sentence")
    return _table(("speaker", "", *measured, "sentences", "with numbers", "words"), rows) if rows else "Not measured."


def _examples(speech: Mapping[str, Any]) -> str:
    rows = [
        (one["speaker"], one["asked"], one["said"], one["heard"], f"[listen](nano/{one['file']})")
        for one in speech["examples"]
    ]
    return _table(("speaker", "asked", "answered", "heard by the recogniser", ""), rows) if rows else ""


def _failures(senses: Mapping[str, Any]) -> str:
    rows = [
        (sense, wrong["asked"], wrong["right"], wrong["reply"])
        for sense, one in senses.items()
        for wrong in one["failures"][:2]
    ]
    return _table(("sense", "asked", "right", "answered"), rows) if rows else "None."


def _stages(stages: Mapping[str, Any]) -> str:
    rows = []
    for stage, one in stages.items():
        losses = f"{one['first']:.3g}", f"{one['last']:.3g}"
        rows.append(
            (stage, f"{one['steps']:.0f}", _minutes(one["seconds"]), *losses, f"![loss](nano/loss-{stage}.png)")
        )
    return _table(("trained", "steps", "minutes", "loss at first", "at last", ""), rows) if rows else ""
