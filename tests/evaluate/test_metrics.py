"""Metrics, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate.metrics import (
    METRICS,
    accepted_length,
    choice_scores,
    load_recogniser,
    real_time_factor,
    spoken_form,
    summarise,
)


@pytest.mark.parametrize(
    "metric, text, references, score",
    [
        ("exact", " Paris\n", ["paris", "Paris"], 1),
        ("exact", "Paris.", ["Paris"], 0),
        ("exact_normalised", "The answer: a cat!", ["answer cat"], 1),
        ("exact_normalised", "anther cat", ["other cat"], 0),
        ("exact_number", "So 3 and 4 make 1,007.", ["#### 1007"], 1),
        ("exact_number", "It is -7.50", ["7.5"], 0),
        ("exact_number", "none", ["none"], 0),
    ],
)
def test_exact_matches(metric: str, text: str, references: list[str], score: int) -> None:
    assert METRICS[metric](text, references) == {metric: score}


def test_errors_in_words_and_characters() -> None:
    pytest.importorskip("jiwer")
    assert spoken_form("Don’t — well-known, ＡＢＣ!  $5") == "don't well known abc 5"
    # Quotation marks are none of the word's, whichever they are; apostrophes inside are.
    assert spoken_form("‘hello’ 'hello' don‘t rock ʼn’ roll '") == "hello hello don't rock n roll"
    wer, cer = METRICS["wer"], METRICS["cer"]
    assert wer("The cat sat.", ["the cat sat"]) == {"word_errors": 0, "words": 3}
    assert wer("a cat sat down", ["the cat sat"]) == {"word_errors": 2, "words": 3}
    assert wer("two words", ["one two big words here", "two word"]) == {"word_errors": 1, "words": 2}
    assert wer("x", ["y", "x a b"]) == {"word_errors": 2, "words": 3}, "the lowest rate, not the fewest errors"
    assert cer("abcd", ["xy", "abcdefg"]) == {"character_errors": 3, "characters": 7}
    assert wer("spare", [""]) == {"word_errors": 1, "words": 0} and wer("", ["gone"]) == {"word_errors": 1, "words": 1}
    assert cer("kitten", ["sitting"]) == {"character_errors": 3, "characters": 7}
    scores = [wer("a b c", ["a b d"]), wer("x", ["y"]), {"exact": 1.0}, {"exact": 0.0}]
    assert summarise(scores) == {"wer": 0.5, "exact": 0.5}, "a corpus counts its words, not its samples"


def test_choices_and_log_likelihoods() -> None:
    scores = choice_scores([-4.0, -5.0, -6.0], [1, 1, 3], ["a", "bbbbb", "ccc"], 0)
    assert scores == {"accuracy": 1, "accuracy_per_token": 0, "accuracy_per_byte": 0}
    scores = choice_scores([-4.0, -5.0, -6.0], [1, 1, 3], ["a", "bbbbb", "ccc"], 2)
    assert scores == {"accuracy": 0, "accuracy_per_token": 1, "accuracy_per_byte": 0}
    assert choice_scores([-4.0, -5.0], [1, 1], ["a", "bbbbb"], 1)["accuracy_per_byte"] == 1
    two = [{"log_likelihood": -3.0, "tokens": 2, "bytes": 8}, {"log_likelihood": -1.0, "tokens": 2, "bytes": 8}]
    summary = summarise(two)
    assert summary["log_likelihood"] == -2 and summary["perplexity_per_token"] == pytest.approx(math.e)
    assert summary["bits_per_byte"] == pytest.approx(0.25 / math.log(2))


def test_accepted_length_and_real_time_factor() -> None:
    given = ([4], [1, 2, 3], [])
    stats = [{"rounds": len(n), "round_tokens": n, "round_most": [4] * len(n)} for n in given]
    assert accepted_length(stats) == {"accepted_length_micro": 2.5, "accepted_length_macro": 3.0}
    assert accepted_length([{}]) == {} == real_time_factor([{}])
    replies = [{"share_seconds": 8, "audio_seconds": 15, "compiled": 0}]
    replies.append({"share_seconds": 2, "audio_seconds": 5, "compiled": 0})
    assert real_time_factor(replies) == {"real_time_factor": 0.5, "replies_not_timed": 0}
    compiling = {"share_seconds": 300, "audio_seconds": 1, "compiled": 3}
    assert real_time_factor([compiling, *replies]) == {"real_time_factor": 0.5, "replies_not_timed": 1}
    assert real_time_factor([compiling]) == {"replies_not_timed": 1}


@pytest.mark.parametrize(
    "name, why",
    [
        ("nothing", "module:function"),
        ("no.such:one", "cannot be loaded"),
        ("math:no", "cannot"),
        ("math:pi", "is no"),
        ("math:", "module:function"),
        (":sin", "module:function"),
        (".math:sin", "cannot be loaded"),
        ("broken_syntax:hear", "cannot be loaded"),
        ("broken_import:hear", "cannot be loaded .*no GPU"),
        ("broken_exit:hear", "cannot be loaded"),
    ],
)
def test_recognisers_that_cannot_be_loaded(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in (("syntax", "def"), ("import", "raise RuntimeError('no GPU')"), ("exit", "raise SystemExit")):
        (tmp_path / f"broken_{module}.py").write_text(text)
    assert callable(load_recogniser("os.path:basename"))
    with pytest.raises(InputError, match=why):
        load_recogniser(name)
