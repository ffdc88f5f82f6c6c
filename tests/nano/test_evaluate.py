"""The stages evaluate and card: rules of judging, intervals, what is kept, conditions of sound, counts of speech."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.inputs.audio import load_audio
from scripts.nano import evaluation, recogniser
from scripts.nano.augment import leveled
from scripts.nano.card import GOALS, text_of
from scripts.nano.evaluation import BATCH, Asked, evaluate_sense, results_of, rows_of
from scripts.nano.judging import RIVALS, confusion, interval, is_right, is_verbatim
from scripts.nano.robustness import conditions
from scripts.nano.rows import assistant, user
from scripts.nano.spoken import Counts

DOCS = Path(__file__).resolve().parents[2] / "docs"


def row(sense: str, said: str, answer: str, *media: str, accepted: tuple[str, ...] = ()) -> dict[str, Any]:
    parts = [{"type": "audio", "audio": f"../media/{sense}/test/{name}"} for name in media]
    messages = [user(*parts, "What is it?"), assistant(said)]
    return {"sense": sense, "messages": messages, "answer": answer, "accepted": list(accepted)}


DIGIT = row("digit", "The digit is seven.", "seven")
STRING = row("digits", "Four, three, eight.", "four, three, eight")
SUM = row("add", "Two plus one is three.", "three")
SPELLED = row("spell", "C, a, t.", "c, a, t")
SAME = row("same", "No, five is written and three is said.", "no")
SCENE = row("scene", "A red ring is on the left.", "red ring")
SOUND = row("silence", "I hear a beep.", "beep")


@pytest.mark.parametrize(
    ("asked", "reply", "right"),
    [
        (DIGIT, "The digit is seven.", True),
        (DIGIT, "seven", True),
        (DIGIT, "The digit is seventeen.", False),
        (DIGIT, "The digit is seven or nine.", False),
        (DIGIT, "Seven, seven.", False),
        (DIGIT, "The digit is 7.", False),
        (DIGIT, "", False),
        (row("digit", "The digit is zero.", "zero", accepted=("oh",)), "oh", False),
        (STRING, "four three eight", True),
        (STRING, "Four, eight, three.", False),
        (STRING, "Four, three, eight, eight.", False),
        (SUM, "Two plus one is three.", True),
        (SUM, "Two plus two is three.", False),
        (SPELLED, "C, A, T", True),
        (SPELLED, "C, a, t, s.", False),
        (SAME, "No, they differ.", True),
        (SAME, "Yes, both are five.", False),
        (SAME, "No, yes.", False),
        (SCENE, "a red ring is on the left", True),
        (SCENE, "A red ring is on the right.", False),
        (SOUND, "A beep is heard.", True),
        (SOUND, "I hear noise.", False),
        (SOUND, "I hear someone say two and a beep.", False),
    ],
)
def test_replies_are_right_or_wrong(asked: dict[str, Any], reply: str, right: bool) -> None:
    assert is_right(asked, reply) == right


def test_answers_are_among_their_rivals() -> None:
    assert {"silence", "beep", "nine"} <= RIVALS["silence"] and "seven" in RIVALS["digit"]
    assert is_right(row("repeat", "Glove.", "glove", accepted=("Gloves.",)), "gloves")
    assert is_verbatim(DIGIT, "the digit is seven") and not is_verbatim(DIGIT, "seven")


def test_the_interval_is_wilsons() -> None:
    assert interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(10, 10)[1] == pytest.approx(1) and interval(0, 0) == (0.0, 1.0)


def test_digits_are_confused() -> None:
    rows = [row("digit", "", "two"), row("digit", "", "two"), row("digit", "", "zero")]
    table = confusion(rows, ["The digit is three.", "The digit is two.", "zero or one"])
    assert table[2][3] == table[2][2] == table[0][10] == 1
    assert np.sum(table) == 3


def test_results_tell_voices_and_failures() -> None:
    rows = [
        row("heard", "The first digit was two.", "two", "000001-first-espeak-en+m5.wav", "000001-recorded-lucas.wav"),
        row("heard", "The first digit was six.", "six", "000002-first-flite-rms.wav"),
    ]
    results = results_of("heard", rows, ["The first digit was two.", "It was two."])
    assert (results["samples"], results["right"], results["verbatim"]) == (2, 1, 1)
    assert results["voices"] == {"espeak-en+m5": [1, 1], "flite-rms": [0, 1]}
    (failure,) = results["failures"]
    assert failure["reply"] == "It was two." and failure["right"] == "The first digit was six."


def test_what_is_asked_twice_counts_once() -> None:
    same, other = json.dumps(SUM), json.dumps(SPELLED)
    assert rows_of("\n".join([same, same, other]), None) == [SUM, SPELLED]
    assert rows_of("\n".join([same, same, other]), 1) == [SUM]


class Parrot:
    """Stands for a model: answers each conversation, and counts what it was asked."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def generate(self, batch: list, max_new_tokens: int) -> list:
        self.sizes.append(len(batch))
        return [type("Reply", (), {"text": f"The digit is {one[0]['content'][-1]['text']}."}) for one in batch]


@pytest.fixture
def parrot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parrot:
    found = Parrot()
    monkeypatch.setattr(evaluation, "identity", lambda model: str(model))
    monkeypatch.setattr(evaluation.omni_jax, "load", lambda model, parts: found)
    rows = []
    for i in range(BATCH + 3):
        one = row("digit", "The digit is two.", "two", f"{i:06d}-recorded-lucas.wav")
        one["messages"][0]["content"][-1]["text"] = "two" if i else "one"
        rows.append(json.dumps(one))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "digit.test.jsonl").write_text("\n".join(rows) + "\n")
    return found


def test_a_sense_is_asked_once(tmp_path: Path, parrot: Parrot) -> None:
    first = evaluate_sense(Asked(tmp_path / "model", tmp_path, None), tmp_path, "digit")
    assert parrot.sizes == [BATCH, BATCH]
    assert (first["samples"], first["right"]) == (BATCH + 3, BATCH + 2)
    assert evaluate_sense(Asked(tmp_path / "model", tmp_path, None), tmp_path, "digit") == first
    assert len(parrot.sizes) == 2
    # Another model, another limit or other rows are asked anew.
    evaluate_sense(Asked(tmp_path / "other", tmp_path, None), tmp_path, "digit")
    assert evaluate_sense(Asked(tmp_path / "other", tmp_path, 2), tmp_path, "digit")["samples"] == 2
    assert parrot.sizes[2:] == [BATCH, BATCH, 2]
    path = tmp_path / "rows" / "digit.test.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert evaluate_sense(Asked(tmp_path / "other", tmp_path, 2), tmp_path, "digit")["samples"] == 1


def test_conditions_change_the_clip_as_they_say(tmp_path: Path) -> None:
    import av

    times = np.arange(16_000) / 16_000
    tone = leveled(np.sin(2 * np.pi * 440 * times), -6)
    expected = {"8 kHz": (8000, 1), "44.1 kHz, stereo": (44_100, 2), "stereo": (16_000, 2), "noise, 10 dB": (16_000, 1)}
    heard = {}
    for name, change in conditions().items():
        (path := tmp_path / "clip").write_bytes(content := change(tone, 1))
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            if name in expected:
                assert (stream.rate, stream.channels) == expected[name]
        if name.startswith("MP3"):
            assert 32_000 * 0.9 / 8 < len(content) < 32_000 * 1.3 / 8
        heard[name] = load_audio(path)
        assert abs(len(heard[name]) - 16_000) < 2500
    rest = heard["noise, 10 dB"] / heard["noise, 10 dB"].std() - tone / tone.std() / np.sqrt(1.1)
    assert 20 * np.log10(rest.std()) == pytest.approx(-10, abs=1.2)


def test_speech_is_counted_in_words_and_numbers() -> None:
    pytest.importorskip("jiwer")
    counts = Counts()
    counts.add("Four, three, eight.", "four free eight eight", 1.5)
    counts.add("The circle is red.", "")
    assert counts.figures() == {"words": 7, "errors": 6, "numbers": 3, "numbers_heard": 2, "seconds": 1.5}
    assert len(counts.misheard) == 2


def test_a_recogniser_hears_noise_as_no_more_than_its_sentences() -> None:
    pytest.importorskip("pocketsphinx")
    hear = recogniser.recogniser(["The digit is seven.", "The digit is two."])
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    assert set(hear(noise, 24_000).split()) <= {"the", "digit", "is", "seven", "two"}


def figures() -> dict[str, Any]:
    good = {"samples": 100, "right": 99, "verbatim": 98, "failures": []}
    short = good | {"right": 80, "voices": {"flite-rms": [80, 100]}}
    counts = {"words": 100, "errors": 30, "numbers": 50, "numbers_heard": 49, "seconds": 60.0}
    return {
        "seed": 3,
        "parameters": {"thinker": 2_500_000, "talker": 1_500_000},
        "senses": {goal.sense: good for goal in GOALS[2:]} | {"digit": short},
        "robust": {"8 kHz": {"samples": 100, "right": 84}, "16 kHz": {"samples": 100, "right": 90}},
        "speech": {"recogniser": "R", "speakers": {"ethan": dict.fromkeys(("said", "ceiling", "floor"), counts)}},
        "stages": {"thinker": {"steps": 4000.0, "first": 6.5, "last": 0.1234}},
    }


def test_the_card_says_what_falls_short() -> None:
    text = text_of(figures())
    assert "4.0 million" in text and "seed 3" in text and "loss-thinker.png" in text and "$" not in text
    behind = next(line for line in text.splitlines() if line.startswith("Short of its goal"))
    assert "digit (80.0 % of 95 %)" in behind and "8 kHz (84.0 % of 85 %)" in behind and "30.0 % of words" in behind
    assert "silence" not in behind and "16 kHz" not in behind
    assert "Not measured: digits." in text
    assert "| 80 of 100 |" in text


def test_the_card_is_that_of_its_figures() -> None:
    if not (path := DOCS / "nano" / "figures.json").exists():
        pytest.skip("no model was evaluated yet")
    assert (DOCS / "nano.md").read_text() == text_of(json.loads(path.read_text()))
