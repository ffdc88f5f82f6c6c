"""What the speakers say, in which conversations the Talker learns it, and that its rows and its report can be used."""

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.inputs.batch import LEAST_COARSE
from omni_jax.settings import Voice
from omni_jax.train.saving import save_part
from omni_jax.train.state import leaf_shardings
from omni_jax.train.talker import TalkerSft
from omni_jax.weights.model import model_config, open_model
from omni_jax.weights.trees import flatten, nest
from scripts.nano import codec_stage, speech, talker
from scripts.nano.codec_stage import CodecModules, code2wav_params
from scripts.nano.listen import MOST, listen, mel_distance
from scripts.nano.speech import ALPHABETS, said_words, sentences
from scripts.nano.text import KEPT, REPEAT
from scripts.nano.thinker import How
from scripts.nano.words import NOUNS, NUMBERS
from scripts.stored_state import save
from tests.nano.small import CODES, write_rows, write_small

FRAMES = 6
LISTS = ("Two, sea.", "Your word is sea.", "Sea, sea, sea, two, sea, two, sea, two, sea.")
SPOKEN = ("The digit is two.", KEPT, "Your word is sea.", "Q, z.")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as the stages before leave it: rows, a small Thinker, and codes of some sentences."""
    write_rows(tmp_path)
    write_small(tmp_path, monkeypatch)
    lines, speech_dir, draw = [], tmp_path / "speech", np.random.default_rng(0)
    speech_dir.mkdir()
    words = {word for text in (*SPOKEN, *LISTS, "River.") for word in said_words(text)}
    for speaker in ("chelsie", "ethan"):
        codes: Any = {word: draw.integers(0, CODES, (16, FRAMES)).astype(np.int16) for word in sorted(words)}
        np.savez(speech_dir / f"{speaker}.npz", **codes)
        for text in SPOKEN:
            split = "test" if text == "Your word is sea." else "train"
            lines.append({"speaker": speaker, "text": text, "split": split})
    (speech_dir / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(talker, "SPOKEN", 120)
    monkeypatch.setattr(speech, "FREQUENT", 1)
    monkeypatch.setattr(talker, "a_list", lambda draw: LISTS[int(draw.integers(len(LISTS)))])
    monkeypatch.setattr(codec_stage, "codes_digest", lambda directory: "a codec")
    monkeypatch.setattr(talker, "codes_digest", lambda directory: "a codec")
    return tmp_path


def test_everything_that_is_said_is_said_alone_or_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    monkeypatch.setattr(speech, "FREQUENT", 1)
    texts = sentences(speech.sayable(tmp_path), 10_000, 0)
    assert len(set(texts)) == len(texts)
    assert {word.capitalize() + "." for word in (*NOUNS, *NUMBERS)} | {*SPOKEN[:3]} <= {*texts}
    letters = [text for text in texts if text[1] in ",." and text != "A."]
    assert sum("q" in text.lower() for text in letters) == ALPHABETS
    # A sense with few answers gives them before one with many gives its second.
    assert texts[-2:] == ["Your word is sea.", "The digit is two."] or texts[-2:] == SPOKEN[2:0:-1]


def test_a_sentence_is_the_answer_in_several_conversations(made: Path) -> None:
    files = talker.write_spoken(made, 0)
    rows = [json.loads(line) for line in files["train"].read_text().splitlines()]
    said = {text: [row for row in rows if row["messages"][-1]["content"] == text] for text in (*SPOKEN, *LISTS)}
    assert not said["Your word is sea."] and said["Two, sea."]
    first = said["The digit is two."]
    assert {row["speaker"] for row in first} == {"chelsie", "ethan"}
    asked = [row["messages"][0]["content"] for row in first]
    assert talker.READ_ALOUD[0]["content"] in asked
    parts = [part for content in asked if not isinstance(content, str) for part in content]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    # Of five conversations two have their picture.
    assert 0.2 * len(first) < len(pictures) < 0.6 * len(first)
    assert all((files["train"].parent / one).exists() for one in pictures)
    assert {np.shape(row["codes"]) for row in first} == {(16, 4 * FRAMES)}
    # Of a conversation of several answers, what follows is left out.
    assert all(len(row["messages"]) == 2 for row in said[KEPT])
    # A test asks in words that training never does.
    first = [row["messages"][0]["content"] for row in map(json.loads, files["test"].open())]
    asked = [content if isinstance(content, str) else content[0]["text"] for content in first]
    held = [wording.split("{")[0] for wording in REPEAT[-3:]]
    assert sum(any(text.startswith(begin) for begin in held) for text in asked) == 2
    assert talker.write_spoken(made, 0) == files
    with pytest.raises(InputError, match="spoken is outdated: seed changed from 0 to 1; delete"):
        talker.write_spoken(made, 1)


def test_answers_and_lists_are_read_aloud_but_no_held_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talker, "ALOUD", 200)
    monkeypatch.setattr(talker, "ALOUD_FRAMES", 5 * FRAMES)
    answers = {"digit": ["The digit is two."], "remember": ["Your word is sea."], "count": [LISTS[2]]}
    monkeypatch.setattr(talker, "sayable", lambda directory: answers)
    file = talker.write_aloud(made, 0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = Counter((row["speaker"], row["messages"][-1]["content"]) for row in rows)
    assert {text for _, text in said} == {LISTS[0], "The digit is two."} and len(said) == 4
    assert 0.15 < sum(said[speaker, LISTS[0]] for speaker in speech.VOICES) / 200 < 0.5
    assert talker.write_aloud(made, 0) == file
    with pytest.raises(InputError, match="aloud.jsonl is outdated: seed changed from 0 to 1; delete"):
        talker.write_aloud(made, 1)


def test_lists_are_of_known_words() -> None:
    texts, again, others = ([speech.a_list(draw) for _ in range(200)] for draw in map(np.random.default_rng, (0, 0, 1)))
    assert texts == again != others
    words = [[word for word in said_words(text) if word != ","] for text in texts]
    assert {len(one) for one in words} == {*range(2, speech.LONGEST_LIST + 1)}
    assert {*chain(*words)} <= {*NUMBERS, *NOUNS, *ascii_lowercase, "it", "says"}
    assert 200 / 16 < sum(text.startswith("It says '") for text in texts) < 200 / 4


def test_the_voiced_model_has_the_codec_and_all_else_of_the_thinker(made: Path) -> None:
    model = made / "mixed" / "model"
    shutil.copytree(made / "thinker" / "model", model)
    config = model_config(model).code2wav
    assert config is not None
    codec = CodecModules.of(config)
    state = codec.begin(3, codec.optimizer(5), np.ones((1, codec.crop), np.float32))
    save(made / "codec.npz", state, 5, 1.0)
    voiced = arrays(talker.write_voiced(made))
    save(made / "codec.npz", state, 6, 1.0)
    with pytest.raises(InputError, match="voiced is outdated: codec.npz changed; delete"):
        talker.write_voiced(made)
    wanted = flatten({**open_params(model), "code2wav": code2wav_params(state)})
    assert voiced.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(voiced[path], value, err_msg=path)


def test_the_joined_model_has_the_thinker_and_all_else_of_the_voice(made: Path) -> None:
    model, voice = made / "thinker" / "model", made / "voice" / "model"
    with pytest.raises(InputError, match="voice/model is missing; run the stage voice first"):
        talker.write_joined(made)
    others = {path: value + 1 for path, value in flatten(open_params(model)["thinker"]).items()}
    save_part("thinker", model, None, nest(others), voice)
    joined, thinker, voiced = arrays(talker.write_joined(made)), arrays(model), arrays(voice)
    for path, value in joined.items():
        np.testing.assert_array_equal(value, (thinker if path.startswith("thinker/") else voiced)[path], err_msg=path)


def test_rows_are_batches_of_few_sizes(made: Path) -> None:
    data = talker.write_spoken(made, 0)["train"]
    recipe = talker.talker_recipe(made / "thinker" / "model", data, made / "talker", How(4, 1e-3, 0, 0))
    omni = omni_jax.load(made / "thinker" / "model", parts=TalkerSft.PARTS)
    batches: Any = recipe.batches(omni)
    step = next(iter(batches))
    batches.close()
    batch = step.batch
    assert not batches.problems and 0 < len(step.samples) <= talker.ROWS
    assert batch.codes.shape in [(talker.ROWS, 16, frames) for frames in (LEAST_COARSE, 2 * LEAST_COARSE)]
    assert batch.prompt.text_ids.shape[1] % LEAST_COARSE == 0
    if batch.thinker is not None:
        ((patches, _),) = batch.thinker.media.vision
        assert patches.shape[0] == LEAST_COARSE


def test_a_talker_that_speaks_alone_is_compared_with_clips(made: Path) -> None:
    omni = omni_jax.load(made / "thinker" / "model")
    files = talker.write_spoken(made, 0)
    rows = talker.read_repeats(files["test"], 8)
    assert [row["speaker"] for row in rows] == ["chelsie", "ethan"]
    for one in listen(omni, rows, Voice(speech_temperature=0)):
        assert one.frames[1] == 4 * FRAMES and 0 <= one.frames[0] <= MOST and one.other >= 0
        assert one.ended == (one.frames[0] < MOST)
    wave = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    assert mel_distance(wave, wave) == 0 < 0.1 < mel_distance(wave, 3 * wave)
    assert mel_distance(wave, wave[:10]) == float("inf")


def open_params(model: Path) -> dict:
    opened = open_model(model)
    return opened.read({name: leaf_shardings(one.shapes, one.axes, None) for name, one in opened.declarations.items()})


def arrays(model: Path) -> dict:
    assert isinstance(model_config(model), OmniConfig)
    return flatten(open_params(model))


def test_every_word_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    said = []

    def synthesise(word: str, voice: str, *_: float) -> np.ndarray:
        said.append((voice, word))
        return np.full(2000 + len(word), 0.1, np.float32)

    monkeypatch.setattr(speech, "synthesised", synthesise)
    monkeypatch.setattr(speech, "which", lambda _: "flite")
    path = speech.write_speech(tmp_path, 20, 0, 1)
    lines = [json.loads(line) for line in path.open()]
    words = {word for line in lines for word in speech.said_words(line["text"])} - {","}
    assert {"will", "remember"} <= words, "also words that are in no last answer"
    words |= {*NUMBERS, *NOUNS, *ascii_lowercase, "it", "says"}
    assert len(lines) == 40 and sorted(said) == sorted((voice, word) for voice in ("rms", "slt") for word in words)
    assert speech.write_speech(tmp_path, 20, 0, 1) == path and len(said) == 2 * len(words)
    with pytest.raises(InputError, match="speech is outdated: sentences changed from 20 to 30; delete"):
        speech.write_speech(tmp_path, 30, 0, 1)
    path.unlink()
    speech.write_speech(tmp_path, 20, 0, 1)
    assert len(said) == 2 * len(words), "words that are there are not said again"
    clips = speech.read_clips(path.parent)["ethan"]
    assert [len(clip) for clip in speech.of_words("Zero, one: two.", clips)] == [3840, 1920, 3840, 1920, 3840]


def test_invented_words_and_long_sentences_are_not_said(tmp_path: Path) -> None:
    write_rows(tmp_path)
    rows = tmp_path / "rows" / "read.train.jsonl"
    texts = ["It says 'sea'."] * speech.FREQUENT + ["It says 'abladchond'.", ", ".join(["one"] * speech.LONGEST) + "."]
    rows.write_text(
        "".join(json.dumps({"messages": [{"role": "assistant", "content": text}]}) + "\n" for text in texts)
    )
    found = sentences(speech.sayable(tmp_path), 10_000, 0)
    assert texts[0] in found and not {*texts[-2:]} & {*found}
