"""Scores of one answer, and of many together.

A sample's scores are plain numbers under their names, as they are written to the results. Errors in words and in
characters are kept as counts, so that a corpus is scored as a whole: errors of all by words of all.

Normalisations, applied to both sides: `exact` drops space at the ends; `exact_normalised` is SQuAD's (lower case, no
punctuation, no articles, single spaces); `exact_number` compares the last numbers in the texts, as for GSM8K. `wer`
and `cer` count, through jiwer, in Unicode's compatibility form (NFKC) in lower case, with spaces for punctuation and
symbols (apostrophes inside words stay) and single spaces.
"""

import importlib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np

from omni_jax.decode.draft.acceptance import Rounds, mean_accepted, mean_accepted_per_reply
from omni_jax.errors import InputError
from omni_jax.files import reason_of

# A recogniser takes float32 samples [n] and their rate and returns what was said.
Recogniser = Callable[[np.ndarray, int], str]
Scores = dict[str, float]

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(text: str, references: Sequence[str]) -> Scores:
    """1 if the text is a reference, but for space at the ends."""
    return {"exact": float(text.strip() in {reference.strip() for reference in references})}


def exact_normalised(text: str, references: Sequence[str]) -> Scores:
    """1 if the text is a reference, both as SQuAD normalises them."""
    return {"exact_normalised": float(_squad(text) in {_squad(reference) for reference in references})}


def exact_number(text: str, references: Sequence[str]) -> Scores:
    """1 if the last number in the text is that of a reference."""
    number = _last_number(text)
    return {"exact_number": float(number is not None and number in {_last_number(ref) for ref in references})}


def word_errors(text: str, references: Sequence[str]) -> Scores:
    """Wrong, missing and spare words against the reference that fits best, and that reference's words."""
    errors, words = _fewest(text, references, "process_words")
    return {"word_errors": errors, "words": words}


def character_errors(text: str, references: Sequence[str]) -> Scores:
    """Wrong, missing and spare characters against the reference that fits best, and that reference's characters."""
    errors, characters = _fewest(text, references, "process_characters")
    return {"character_errors": errors, "characters": characters}


MetricName = Literal["exact", "exact_normalised", "exact_number", "wer", "cer"]
METRICS: dict[MetricName, Callable[[str, Sequence[str]], Scores]] = {
    "exact": exact,
    "exact_normalised": exact_normalised,
    "exact_number": exact_number,
    "wer": word_errors,
    "cer": character_errors,
}


def check_metrics(names: Sequence[MetricName]) -> tuple[MetricName, ...]:
    """The names, each once, if what they need is installed; InputError otherwise."""
    if {"wer", "cer"} & set(names):
        _jiwer()
    return tuple(dict.fromkeys(names))


def choice_scores(
    log_likelihoods: Sequence[float], tokens: Sequence[int], choices: Sequence[str], answer: int
) -> Scores:
    """Whether the right choice is the likeliest: by its log-likelihood, and by that per token and per byte."""
    sums = np.asarray(log_likelihoods)
    sizes = {"accuracy": 1.0, "accuracy_per_token": np.maximum(tokens, 1)}
    sizes["accuracy_per_byte"] = np.asarray([max(len(choice.encode()), 1) for choice in choices])
    return {name: float(np.argmax(sums / size) == answer) for name, size in sizes.items()}


def summarise(scores: Sequence[Scores]) -> Scores:
    """The scores of many samples together: rates from counts, means of the rest.

    Per token and byte, log-likelihoods become perplexities too. A sample counts where it has a score.
    """
    names = list(dict.fromkeys(name for score in scores for name in score))
    totals = {name: float(np.sum([score[name] for score in scores if name in score])) for name in names}
    summary = {}
    for rate, errors, size in (("wer", "word_errors", "words"), ("cer", "character_errors", "characters")):
        if errors in totals:
            summary[rate] = totals.pop(errors) / max(totals.pop(size), 1.0)
    tokens, size = totals.pop("tokens", 0.0), totals.pop("bytes", 0.0)
    if tokens and "log_likelihood" in totals:
        summary["perplexity_per_token"] = float(np.exp(-totals["log_likelihood"] / tokens))
        summary["bits_per_byte"] = -totals["log_likelihood"] / max(size, 1.0) / float(np.log(2))
    return summary | {name: total / sum(name in score for score in scores) for name, total in totals.items()}


def accepted_length(stats: Sequence[dict[str, Any]]) -> Scores:
    """Tokens per round of drafting: over all rounds (micro), and the mean over replies (macro).

    stats: those of replies; empty if none was drafted.
    """
    drafted = [Rounds(np.asarray(s["round_tokens"]), np.asarray(s["round_most"])) for s in stats if s.get("rounds")]
    return (
        {"accepted_length_micro": mean_accepted(drafted), "accepted_length_macro": mean_accepted_per_reply(drafted)}
        if drafted
        else {}
    )


def real_time_factor(stats: Sequence[dict[str, Any]]) -> Scores:
    """Seconds of wall time per second of speech, text included; empty if nothing was spoken.

    Of replies that run at once each has its share of the time, so more slots give a lower factor. Replies during which
    a program was compiled are counted, not timed: without compiling they take a fraction.
    """
    spoken = [s for s in stats if s.get("audio_seconds")]
    timed = [s for s in spoken if not s["compiled"]]
    seconds, audio = sum(s["share_seconds"] for s in timed), sum(s["audio_seconds"] for s in timed)
    factor = {"real_time_factor": seconds / audio} if timed else {}
    return factor | {"replies_not_timed": len(spoken) - len(timed)} if spoken else {}


def load_recogniser(name: str) -> Recogniser:
    """The recogniser "module:function", InputError if there is none."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise InputError(f"recogniser {name!r}; name a function as module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        # A module of the user's may raise anything.
        raise InputError(f"recogniser {name!r} cannot be loaded ({reason_of(error)}); is it installed?") from error
    if not callable(found):
        raise InputError(f"recogniser {name!r} is no function")
    return cast(Recogniser, found)


def recognise(recogniser: Recogniser, wave: np.ndarray, rate: int) -> str:
    """What a recogniser hears in float32 samples [n]; InputError if it raises anything or returns no text."""
    try:
        heard = recogniser(wave, rate)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"the recogniser failed ({why}); it is called with float32 samples and their rate") from error
    if not isinstance(heard, str):
        raise InputError(f"the recogniser returned a {type(heard).__name__}; it must return what it heard as text")
    return heard


def spoken_form(text: str) -> str:
    """A text as it is compared for errors in words and characters; see the module."""
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] not in "PS" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def _squad(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _fewest(text: str, references: Sequence[str], process: str) -> tuple[float, float]:
    """Errors against the reference with the lowest rate, and its size."""
    jiwer, heard, best = _jiwer(), spoken_form(text), None
    for reference in map(spoken_form, references):
        size = len(reference.split() if process == "process_words" else reference)
        if size:
            found = getattr(jiwer, process)(reference, heard)
            errors = found.substitutions + found.deletions + found.insertions
        else:
            # jiwer refuses a reference that is empty: all words are spare.
            errors = len(heard.split() if process == "process_words" else heard)
        if best is None or errors * max(best[1], 1) < best[0] * max(size, 1):
            best = (errors, size)
    if best is None:
        raise InputError("there is no reference to compare with")
    return float(best[0]), float(best[1])


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise InputError("wer and cer need jiwer; pip install 'omni_jax[evaluate]'") from error
    return jiwer
