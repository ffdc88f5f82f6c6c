"""The codec: codebooks that stand for latents, a gradient through them, and training that goes on where it stopped."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import CODEC_MARKS, OmniConfig
from omni_jax.decode.speech.vocode import vocode
from omni_jax.errors import InputError
from scripts import stored_state
from scripts.nano import codec_stage
from scripts.nano.codec import DECAY, Codebooks, decode, log_mel, quantise, spectral_loss, updated
from scripts.nano.codec_stage import (
    CodecModules,
    code2wav_params,
    codes_digest,
    read_codes,
    read_waves,
    train_codec,
    write_codes,
)
from scripts.nano.config import nano_config, nano_tokenizer
from scripts.nano.senses import wordings
from scripts.nano.sounds import trimmed
from scripts.nano.speech import FRAME, PAUSES, read_clips
from scripts.nano.words import DIGITS
from scripts.stored_state import save

RATE = 24_000


@pytest.fixture(scope="module")
def codec() -> CodecModules:
    config = nano_config(nano_tokenizer(wordings()))
    config["code2wav_config"] |= {"decoder_dim": 32, "hidden_size": 16, "num_hidden_layers": 1, "codebook_size": 8}
    config["talker_config"]["text_config"]["vocab_size"] = 8 + CODEC_MARKS
    config["talker_config"]["code_predictor_config"]["vocab_size"] = 8
    read = OmniConfig.from_hf(config).code2wav
    assert read is not None
    return CodecModules.of(read)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import soundfile

    folder, lines = tmp_path_factory.mktemp("spoken"), []
    (folder / "ethan").mkdir()
    for i, word in enumerate(DIGITS[:4]):
        t = np.arange(FRAME * (6 + 6 * (i % 2))) / RATE
        wave = 0.3 * np.sin(2 * np.pi * (200 + 90 * i) * t)
        soundfile.write(folder / "ethan" / f"{word}.wav", wave, RATE, subtype="PCM_16")
        text = f"{word.capitalize()}, {DIGITS[0]}."
        split = "test" if i == 3 else "train"
        lines.append({"speaker": "ethan", "text": text, "split": split})
    (folder / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_codebooks_take_what_is_left() -> None:
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3)), jnp.float32)
    entries = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 3)), jnp.float32)
    used = jnp.where(jnp.arange(50) < 25, 4, 2)
    found = quantise(latents, entries, used)
    for n in range(50):
        rest = np.asarray(latents[n])
        for q in range(4):
            np.testing.assert_allclose(found.residuals[q, n], rest, atol=1e-5)
            nearest = int(np.argmin(((np.asarray(entries[q]) - rest) ** 2).sum(1)))
            assert nearest == found.codes[q, n]
            rest = rest - np.asarray(entries[q, nearest]) * (q < int(used[n]))
        np.testing.assert_allclose(found.value[n], np.asarray(latents[n]) - rest, atol=1e-5)


def test_entries_become_the_means_of_what_they_stand_for() -> None:
    latents = np.asarray([[0.0, 1.0], [0.0, 3.0], [9.0, 0.0]], np.float32)
    entries, counts = np.asarray([[0.0, 2.5], [8.0, 0.0], [50.0, 50.0]], np.float32), np.asarray([2.0, 1.0, 0.0])
    books = Codebooks(
        jnp.asarray(entries[None]), jnp.asarray(counts[None]), jnp.asarray((entries * counts[:, None])[None])
    )
    found = quantise(jnp.asarray(latents), books.entries, jnp.ones(3, jnp.int32))
    new = updated(books, found, jnp.ones(3, jnp.int32), jax.random.key(0))
    for c, stands_for in ((0, latents[:2]), (1, latents[2:])):
        count = DECAY * counts[c] + (1 - DECAY) * len(stands_for)
        total = DECAY * counts[c] * entries[c] + (1 - DECAY) * stands_for.sum(0)
        np.testing.assert_allclose(new.counts[0, c], count, rtol=1e-6)
        np.testing.assert_allclose(new.entries[0, c], total / count, rtol=1e-5)
    # What nothing used becomes one of the latents.
    assert np.asarray(new.entries[0, 2]).tolist() in latents.tolist() and new.counts[0, 2] == 1
    # A latent for which a codebook is not used moves none of its entries.
    unmoved = updated(books, found, jnp.zeros(3, jnp.int32), jax.random.key(0))
    np.testing.assert_allclose(unmoved.entries[0, :2], entries[:2], rtol=1e-6)


def test_the_vocoder_of_the_model_makes_the_sound_of_training(codec: CodecModules) -> None:
    optimizer = pytest.importorskip("optax").sgd(0.0)
    waves = 0.1 * np.random.default_rng(0).standard_normal((2, codec.crop)).astype(np.float32)
    state = codec.begin(0, optimizer, waves)
    latents = jnp.asarray(np.random.default_rng(2).standard_normal((2 * 16, 16)), jnp.float32)
    found = quantise(latents, state.codebooks.entries, jnp.full(32, 16))
    trained = decode(state.params["code2wav"], found.value.reshape(2, 16, 16), codec.vocoder)
    codes = np.asarray(found.codes).reshape(16, 2, 16).transpose(1, 0, 2)
    for got, want in zip(vocode(code2wav_params(state), codec.vocoder, codec.config, codes), trained, strict=True):
        np.testing.assert_allclose(got, np.clip(want, -1, 1), atol=2e-5)


@pytest.fixture
def directory(spoken: Path, tmp_path: Path) -> Path:
    copytree(spoken, tmp_path / "speech")
    return tmp_path


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    codec: CodecModules, directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("whole")
    copytree(directory / "speech", other / "speech")
    monkeypatch.setattr(stored_state, "LOG_STEPS", 2)
    whole, last = train_codec(codec, other, 10, 1e9, seed=0)
    losses = logged(other)
    assert last == 10 and float(losses[-1][1]) < float(losses[0][1])

    def killed(file: Path, state: Any, step: int, spent: float) -> None:
        if step == 8:
            raise KeyboardInterrupt
        if step <= 5:
            save(file, state, step, spent)

    with monkeypatch.context() as patched:
        patched.setattr(stored_state, "SAVE_SECONDS", -1)
        patched.setattr(stored_state, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train_codec(codec, directory, 10, 1e9, seed=0)
    assert [row[0] for row in logged(directory)] == ["0", "2", "4", "6"]
    assert train_codec(codec, directory, 10, 0, seed=0)[1] == 6
    state, last = train_codec(codec, directory, 10, 1e9, seed=0)
    assert last == 10 and logged(directory) == losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, state))
    written = (directory / "codec.npz").stat().st_mtime_ns
    assert train_codec(codec, directory, 10, 1e9, seed=0)[1] == 10
    assert logged(directory) == losses and (directory / "codec.npz").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="codec.npz is outdated: steps changed from 10 to 20; delete"):
        train_codec(codec, directory, 20, 1e9, seed=0)


def logged(directory: Path) -> list[list[str]]:
    """The rows of codec.csv without their seconds."""
    rows = [line.split(",") for line in (directory / "codec.csv").read_text().splitlines()]
    return [[row[0], *row[2:]] for row in rows]


def test_codes_are_of_the_last_codec(codec: CodecModules, directory: Path) -> None:
    state = codec.begin(0, pytest.importorskip("optax").sgd(0.0), np.ones((1, codec.crop), np.float32))
    save(directory / "codec.npz", state, 1, 0.0)
    with pytest.raises(InputError, match="run the stage codec to its end first"):
        read_codes(directory)
    write_codes(codec, state, directory)
    clips, codes = read_clips(directory / "speech")["ethan"], read_codes(directory)["ethan"]
    assert codes.keys() == clips.keys() == {*DIGITS[:4], *PAUSES}
    for word, wave in clips.items():
        assert codes[word].shape == (16, len(wave) // FRAME) and 0 <= codes[word].min() and codes[word].max() < 8
    first, written = codes_digest(directory), directory / "speech" / "ethan.npz"
    written.unlink()
    write_codes(codec, state, directory)
    assert not written.exists()
    save(directory / "codec.npz", state, 2, 0.0)
    with pytest.raises(InputError, match="lacks codes of the trained codec"):
        codes_digest(directory)
    write_codes(codec, state, directory)
    assert written.exists() and codes_digest(directory) != first


def test_a_crop_is_a_part_of_a_sentence(codec: CodecModules, directory: Path) -> None:
    (first, *_), clips = read_waves(directory / "speech", "train"), read_clips(directory / "speech")["ethan"]
    assert [len(part) for part in first] == [len(clips["zero"]), FRAME, len(clips["zero"])]
    (crop,) = codec_stage._crops(np.random.default_rng(0), [first], codec.crop, 1)
    said = np.concatenate(first) / 32768
    assert len(crop) == codec.crop > len(said) and not crop[len(said) :].any()
    np.testing.assert_allclose(crop[: len(said)] / crop[: len(said)].max(), said / said.max(), atol=1e-4)


def test_spectra_tell_sounds_apart() -> None:
    t = np.arange(RATE) / RATE
    low, high = (jnp.asarray(np.sin(2 * np.pi * f * t)[None], jnp.float32) for f in (300, 2000))
    assert spectral_loss(low, low) < 1e-3 < 1 < spectral_loss(low, high)
    assert spectral_loss(low, jnp.roll(low, 5, axis=1)) < 0.2
    mel = log_mel(jnp.concatenate([low, high]))
    assert mel.shape == (2, 100, 80) and int(mel[0, 50].argmax()) < int(mel[1, 50].argmax())


def test_silence_is_cut() -> None:
    wave = np.concatenate([np.zeros(RATE), np.full(RATE // 10, 0.5), np.zeros(RATE)]).astype(np.float32)
    cut = trimmed(wave, RATE)
    assert len(cut) == RATE // 10 + round(0.04 * RATE) + round(0.12 * RATE) - 1 and abs(cut).max() <= 0.95
    assert len(trimmed(wave, RATE, 0.01, 0.02)) == RATE // 10 + round(0.01 * RATE) + round(0.02 * RATE) - 1
