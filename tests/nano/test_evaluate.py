"""The stage evaluate: rules of judging, intervals, what is kept, conditions of sound, counts of speech."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.errors import CheckpointError
from omni_jax.inputs.audio import load_audio
from omni_jax.weights import locate
from scripts.nano import evaluation, recogniser
from scripts.nano.augment import leveled
from scripts.nano.evaluation import (
    BATCH,
    Evaluator,
    by_origin,
    evaluate_sense,
    interval_of,
    read_sense,
    results_of,
    rows_of,
)
from scripts.nano.judging import RIVALS, confusion, interval, is_right, is_verbatim
from scripts.nano.robustness import conditions
from scripts.nano.rows import assistant, user
from scripts.nano.spoken import PIECE, Counts, counts_of, shuffled


def row(sense: str, said: str, answer: str, *media: str) -> dict[str, Any]:
    parts = [{"type": "audio", "audio": f"../media/{sense}/test/{name}"} for name in media]
    messages = [user(*parts, "What is it?"), assistant(said)]
    return {"sense": sense, "messages": messages, "answer": answer}


DIGIT = row("digit", "The digit is seven.", "seven")
STRING = row("digits", "Four, three, eight.", "four, three, eight")
SUM = row("add", "Two plus one is three.", "three")
SPELLED = row("spell", "C, a, t.", "c, a, t")
SAME = row("same", "I see five and hear three: no, they are not the same.", "no")
WHICH = row("compare", "A blue circle is first, then a red ring is second: the ring is second.", "second")
SCENE = row("scene", "A red ring is on the left.", "red ring")
RINGS = row("scene", "A red ring, one, a blue star, a blue ring, two: there are two rings.", "two")
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
        (row("digit", "The digit is zero.", "zero"), "oh", False),
        (row("repeat", "Glove.", "glove"), "gloves", False),
        (STRING, "four three eight", True),
        (STRING, "Four, eight, three.", False),
        (STRING, "Four, three, eight, eight.", False),
        (SUM, "Two plus one is three.", True),
        (SUM, "Two plus two is three.", False),
        (SPELLED, "C, A, T", True),
        (SPELLED, "C, a, t, s.", False),
        (SAME, "No, they differ.", True),
        (SAME, "I see five and hear five: yes, they are the same.", False),
        (WHICH, "A blue circle is first, then a red ring is second: the ring is second.", True),
        (WHICH, "second", True),
        (WHICH, "A blue circle is first, then a red ring is second: the ring is first.", False),
        (WHICH, "A blue circle is first, then a red ring is second.", False),
        (WHICH, "The ring is first: no: the ring is second.", False),
        (DIGIT, "Five: the digit is seven.", False),
        (SAME, "No, yes.", False),
        (SCENE, "a red ring is on the left", True),
        (SCENE, "A red ring is on the right.", False),
        (RINGS, "A red ring, one, a blue star, a blue ring, two: there are two rings.", True),
        (RINGS, "A red ring, one, a blue ring, two: there are two rings.", True),
        (RINGS, "There are two rings.", True),
        (RINGS, "A red ring, one, a blue star, a blue ring, two: there are three rings.", False),
        (RINGS, "Two rings: there are two rings: there are three rings.", False),
        (RINGS, "A red ring, a blue star, a blue ring:", False),
        (SCENE, "A ring: a red ring is on the left.", False),
        (SOUND, "A beep is heard.", True),
        (SOUND, "I hear noise.", False),
        (SOUND, "I hear someone say two and a beep.", False),
    ],
)
def test_replies_are_right_or_wrong(asked: dict[str, Any], reply: str, right: bool) -> None:
    assert is_right(asked, reply) == right


def test_answers_are_among_their_rivals() -> None:
    assert {"silence", "beep", "nine"} <= RIVALS["silence"] and "seven" in RIVALS["digit"]
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
    monkeypatch.setattr(evaluation.omni_jax, "load", lambda model, dtype, parts: found)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    write_rows(tmp_path, BATCH + 3)
    return found


def write_rows(output: Path, number: int) -> None:
    """Rows of one digit each, and their sounds."""
    media, rows = output / "media" / "digit" / "test", []
    media.mkdir(parents=True, exist_ok=True)
    (output / "rows").mkdir(exist_ok=True)
    for i in range(number):
        one = row("digit", "The digit is two.", "two", f"{i:06d}-recorded-lucas.wav")
        one["messages"][0]["content"][-1]["text"] = "two" if i else "one"
        rows.append(json.dumps(one) + "\n")
        (media / f"{i:06d}-recorded-lucas.wav").write_bytes(b"sound")
    (output / "rows" / "digit.test.jsonl").write_text("".join(rows))


def test_a_sense_is_asked_once(tmp_path: Path, parrot: Parrot) -> None:
    first = evaluate_sense(Evaluator(tmp_path / "model", tmp_path), tmp_path, "digit")
    assert parrot.sizes == [BATCH, BATCH]
    assert (first["samples"], first["right"]) == (BATCH + 3, BATCH + 2)
    again = Evaluator(tmp_path / "model", tmp_path)
    assert evaluate_sense(again, tmp_path, "digit") == first == read_sense(again, tmp_path, "digit")
    assert len(parrot.sizes) == 2
    # Another model, type or limit is asked anew, and what the first one said stays.
    evaluate_sense(Evaluator(tmp_path / "other", tmp_path), tmp_path, "digit")
    evaluate_sense(Evaluator(tmp_path / "model", tmp_path, None, "bfloat16"), tmp_path, "digit")
    assert evaluate_sense(Evaluator(tmp_path / "model", tmp_path, 2), tmp_path, "digit")["samples"] == 2
    assert parrot.sizes[2:] == [BATCH, BATCH, BATCH, BATCH, 2]
    assert read_sense(again, tmp_path, "digit") == first and read_sense(again, tmp_path, "add") is None


def test_other_sounds_and_questions_are_asked_anew(tmp_path: Path, parrot: Parrot) -> None:
    write_rows(tmp_path, 2)
    evaluator = Evaluator(tmp_path / "model", tmp_path)
    evaluate_sense(evaluator, tmp_path, "digit")
    (tmp_path / "media" / "digit" / "test" / "000001-recorded-lucas.wav").write_bytes(b"other sound")
    assert read_sense(evaluator, tmp_path, "digit") is None
    evaluate_sense(evaluator, tmp_path, "digit")
    rows = tmp_path / "rows" / "digit.test.jsonl"
    rows.write_text(rows.read_text().replace('"text": "one"', '"text": "two"'))
    assert evaluate_sense(evaluator, tmp_path, "digit")["right"] == 2
    assert parrot.sizes == [2, 2, 2]


def test_kept_replies_are_judged_when_they_are_read(tmp_path: Path, parrot: Parrot) -> None:
    evaluator, rows = Evaluator(tmp_path / "model", tmp_path), tmp_path / "rows" / "digit.test.jsonl"
    evaluate_sense(evaluator, tmp_path, "digit")
    rows.write_text(rows.read_text().replace('"answer": "two"', '"answer": "one"'))
    assert evaluate_sense(evaluator, tmp_path, "digit")["right"] == 1
    assert len(parrot.sizes) == 2


def test_a_model_that_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Evaluator("absent", tmp_path)
    # A new export has another identity under the same name.
    (exported := tmp_path / "nano").mkdir()
    (exported / "config.json").write_text("{}")
    monkeypatch.setattr(locate, "NANO", exported)
    before = Evaluator("nano", tmp_path).identity
    (exported / "config.json").write_text('{"new": 1}')
    assert Evaluator("nano", tmp_path).identity != before


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


def test_speech_is_counted_in_words_and_strings_of_numbers() -> None:
    pytest.importorskip("jiwer")
    counts = Counts()
    counts.add("Four, three, eight.", "four free eight eight", 1.5)
    counts.add("The circle is red.", "")
    counts.add("It is two.", "it is two")
    counts.add("It is two.", "it is two one")
    found = counts.figures()
    assert found["words"] == 13 and found["errors"] == 7 and found["sentences"] == 4 and found["seconds"] == 1.5
    # A number too much is no error of a number that was to be heard, but of its string.
    assert (found["numbers"], found["numbers_heard"], found["strings"], found["strings_right"]) == (5, 4, 3, 1)
    assert len(counts.misheard) == 3


def test_speech_is_compared_with_what_is_guessed() -> None:
    pytest.importorskip("jiwer")
    told = {"seconds": 1.0, "shuffled": "two", "synthesised": "it is two"}
    transcripts = [
        {"text": "It is two.", "heard": "it is two", **told},
        {"text": "It is six.", "heard": "it is six", **told},
    ]
    found = counts_of(transcripts, trained={"it is two"})
    assert found["said"]["errors"] == 0 and found["said"]["sentences"] == 2
    assert (found["new"]["sentences"], found["new"]["numbers"]) == (1, 1)
    assert found["another"]["strings_right"] == 0 and found["another"]["errors"] == 2
    assert found["shuffled"]["strings_right"] == 1 and found["synthesised"]["strings_right"] == 1


def test_pieces_are_shuffled_and_none_is_lost() -> None:
    wave = np.arange(10 * PIECE + 7, dtype=np.float32)
    mixed = shuffled(wave, 0)
    assert not np.array_equal(mixed, wave) and np.array_equal(np.sort(mixed), wave)
    assert np.array_equal(shuffled(wave[:0], 0), wave[:0])


def test_the_interval_over_voices_is_wider_where_voices_differ() -> None:
    voices = {"recorded-lucas": [50, 100], "flite-rms": [100, 100], "recorded-allison": [100, 100]}
    low, high = interval_of({"samples": 300, "right": 250, "voices": voices})
    assert low < interval(250, 300)[0] - 0.05 and high == 1
    alike = {name: [90, 100] for name in voices}
    assert interval_of({"samples": 300, "right": 270, "voices": alike}) == interval(270, 300)
    # Sounds without a voice are samples of their own.
    noise = {"samples": 300, "right": 270, "voices": {"noise": [270, 300]}}
    assert interval_of(noise)[0] == pytest.approx(interval(270, 300)[0], abs=0.01)
    assert by_origin(voices | {"noise": [1, 1]}) == {"recorded people": [150, 200], "synthetic voices": [100, 100]}


def test_a_recogniser_hears_noise_as_no_more_than_its_sentences() -> None:
    pytest.importorskip("pocketsphinx")
    hear = recogniser.recogniser(["The digit is seven.", "The digit is two."])
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    assert set(hear(noise, 24_000).split()) <= {"the", "digit", "is", "seven", "two"}
