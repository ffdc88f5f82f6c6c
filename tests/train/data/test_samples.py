"""Samples with their mask of what is learned, and batches in which each is as if alone."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.inputs.options import Options
from omni_jax.inputs.processor import Processor
from omni_jax.train.batch import IGNORED
from omni_jax.train.data.samples import TextRecipe, frame_sizes
from omni_jax.train.data.text import text_batch

QUESTION = {"role": "user", "content": "What do you see and hear?"}
SPOKEN = "hello_with_speech.mp4"
REPLY = {"role": "assistant", "content": "A cat, and a voice."}
ROWS: dict[str, dict[str, Any]] = {
    "text": {"messages": [QUESTION, REPLY]},
    "picture": {"messages": [{"role": "user", "content": "<image>what?"}, REPLY], "images": ["chelsea.png"]},
    "pictures": {
        "messages": [{"role": "user", "content": "<image>then<image>"}, REPLY, QUESTION, REPLY | {"loss": False}],
        "images": ["china.jpg", "chelsea.png"],
    },
    "sound": {"messages": [QUESTION, REPLY], "audios": ["alsa_Front_Center.flac"]},
    "video": {"messages": [{"role": "user", "content": "so <video> ?"}, REPLY], "videos": ["hello_silent.mp4"]},
    "heard": {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": SPOKEN, "use_audio_in_video": True}]},
            REPLY,
        ]
    },
    "long": {"messages": [QUESTION, REPLY] * 4},
}  # fmt: skip
OPTIONS: dict[str, Any] = {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "nframes": 4}


@pytest.fixture(scope="module")
def samples(recipe: TextRecipe, data_dir: Path) -> dict[str, Any]:
    return {name: recipe.samples(row, data_dir, f"{name}:1")[0] for name, row in ROWS.items()}


def test_lengths_and_masks_are_those_of_the_whole_row(samples: dict[str, Any], recipe: TextRecipe) -> None:
    """Against a statement of each row: a prompt, replies in the order of its messages, media at full length."""
    processor = recipe.processor
    for name, sample in samples.items():
        packed = recipe.collate([[sample]], 1, 300)
        assert packed.tokens == sample.length and packed.samples == [f"{name}:1"]
        said = processor.tokenizer.decode(packed.token_ids[packed.learned], skip_special=False)
        assert said == "A cat, and a voice.<|im_end|>" * (4 if name == "long" else 1)
        labels = text_batch(packed).labels
        assert np.array_equal(labels != IGNORED, packed.learned)
        assert np.array_equal(labels[packed.learned], packed.token_ids[packed.learned])


def alone(processor: Processor, name: str, data_dir: Path) -> Any:
    """The row as generation prepares a prompt."""
    row = ROWS[name]
    messages = [{key: value for key, value in m.items() if key != "loss"} for m in row["messages"]]
    kind = {"pictures": "image", "picture": "image", "sound": "audio", "video": "video"}.get(name)
    if kind is not None:
        files, texts = iter(row[f"{kind}s"]), messages[0]["content"]
        marks = texts if f"<{kind}>" in texts else f"<{kind}>{texts}"
        pieces = marks.replace(f"<{kind}>", f"|<{kind}>|").split("|")
        content = [{"type": kind, kind: str(data_dir / next(files))} if piece == f"<{kind}>" else
                   {"type": "text", "text": piece} for piece in pieces if piece]  # fmt: skip
        messages = [{"role": "user", "content": content}, *messages[1:]]
    elif name == "heard":
        part = messages[0]["content"][0]
        messages = [{"role": "user", "content": [part | {"video": str(data_dir / part["video"])}]}, *messages[1:]]
    return processor.prepare(messages, add_generation_prompt=False, media=OPTIONS)


def test_packed_samples_are_as_they_are_alone(samples: dict[str, Any], recipe: TextRecipe, data_dir: Path) -> None:
    """Tokens, positions and the media behind each token, of every sample in a packed batch."""
    rows = [["picture", "text", "heard"], ["pictures", "sound"], ["video", "long", "text"]]
    packed = recipe.collate([[samples[name] for name in row] for row in rows], 4, 400)
    batch = text_batch(packed)
    assert batch.token_ids.shape == (4, 400) and batch.media is not None
    merge = recipe.processor.config.thinker.vision.spatial_merge_size**2
    seen = np.concatenate([p.reshape(-1, merge * p.shape[-1]) for p, _ in batch.media.vision])
    assert packed.tokens == sum(samples[name].length for row in rows for name in row)
    for b, row in enumerate(rows):
        at = 0
        for name in row:
            expected = alone(recipe.processor, name, data_dir)
            n = expected.token_ids.shape[1]
            span = slice(at, at + n)
            assert np.array_equal(batch.token_ids[b, span], expected.token_ids[0])
            assert np.array_equal(batch.position_ids[:, b, span], expected.position_ids[:, 0])
            assert set(batch.first_seen[b, span].tolist()) == {at}
            assert not packed.learned[b, at]
            index = batch.media.visual_index[b, span]
            theirs = [p.patches.reshape(-1, merge * p.patches.shape[-1]) for p in expected.vision]
            found = expected.visual_index[0] >= 0
            assert np.array_equal(index >= 0, found)
            if theirs:
                assert np.array_equal(seen[index[found]], np.concatenate(theirs)[expected.visual_index[0][found]])
            heard = np.asarray(batch.media.audio_index[b, span])
            assert np.array_equal(heard >= 0, expected.audio_index[0] >= 0)
            if expected.audio is not None:
                assert_same_sound(batch.media, heard, expected)
            at += n
        assert np.array_equal(batch.first_seen[b, at:], np.arange(at, 400)) and not packed.learned[b, at:].any()
    assert np.array_equal(batch.first_seen[3], np.arange(400)) and not batch.token_ids[3].any()


def assert_same_sound(media: Any, heard: np.ndarray, expected: Any) -> None:
    mel, frames, width = media.audio
    for ours, theirs in zip(heard[heard >= 0], expected.audio_index[0][expected.audio_index[0] >= 0], strict=True):
        here, there = np.divmod(ours // 13, mel.shape[1]), np.divmod(theirs // 13, expected.audio.mel.shape[1])
        assert ours % 13 == theirs % 13
        assert np.array_equal(mel[here], expected.audio.mel[there])
        assert frames[here] == expected.audio.frames[there] and width[here] == expected.audio.width[there]


def test_a_medium_in_a_reply_is_not_learned(recipe: TextRecipe, data_dir: Path) -> None:
    row = {"messages": [QUESTION, {"role": "assistant", "content": "see <image> there"}], "images": ["chelsea.png"]}
    packed = recipe.collate([recipe.samples(row, data_dir, "a:1")], 1, 200)
    said = recipe.processor.tokenizer.decode(packed.token_ids[packed.learned], skip_special=False)
    assert said == "see  there<|im_end|>"


def test_plain_text_is_cut_and_learned(recipe: TextRecipe, data_dir: Path) -> None:
    text = "one two three " * 120
    samples = recipe.samples({"text": text}, data_dir, "a:7")
    ids = np.concatenate([s.token_ids for s in samples])
    assert recipe.processor.tokenizer.decode(ids, skip_special=False) == text + "<|endoftext|>"
    assert [s.length for s in samples[:-1]] == [300] * (len(samples) - 1) and len(samples) > 1
    assert all(not s.learned[0] and s.learned[1:].all() and s.where == "a:7" for s in samples)


@pytest.mark.parametrize("row, why", [
    ({"messages": [QUESTION]}, "no token of the row is learned"),
    ({"messages": [QUESTION, REPLY | {"loss": False}]}, "no token of the row is learned"),
    ({"messages": [QUESTION, REPLY] * 40}, r"the row has \d+ tokens, more than max_length 300"),
    ({"messages": [QUESTION, REPLY], "images": ["none.png"]}, "none.png does not exist; paths of media are relative"),
    ({"messages": [QUESTION, REPLY], "images": ["https://a.org/b.png"]}, "nothing is fetched"),
    ({"messages": [QUESTION, REPLY], "images": ["LICENSES.md"]}, "message 0, part 0: image .*LICENSES.md"),
    ({"messages": [QUESTION, REPLY], "audios": ["chelsea.png"]}, "message 0, part 0: .*chelsea.png"),
    ({"messages": [QUESTION, REPLY], "images": [5]}, "give a path or base64"),
    ({"messages": [QUESTION, REPLY | {"contents": "x"}]}, "message 1 has the unknown key 'contents'; did you mean"),
    ({"text": "a <|image_pad|> b"}, "holds a control token of media"),
    ({"messages": []}, "messages is empty"),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_rows_that_cannot_be_used(recipe: TextRecipe, data_dir: Path, row: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        recipe.samples(row, data_dir, "a:1")


def test_a_medium_that_is_lost_later_leaves_its_sample_out(recipe: TextRecipe, data_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes((data_dir / "chelsea.png").read_bytes())
    row = {"messages": [QUESTION, REPLY], "images": ["a.png"]}
    lost, kept = recipe.samples(row, tmp_path, "a:1")[0], recipe.samples(ROWS["text"], tmp_path, "a:2")[0]

    def shrink() -> None:
        Image.new("RGB", (32, 32)).save(picture)

    for damage, why in (
        (lambda: picture.write_bytes(picture.read_bytes()[:5000]), "a.png"),
        (picture.unlink, "a.png"),
        (shrink, "its media have changed since they were read first"),
    ):
        damage()
        packed = recipe.collate([[lost, kept]], 1, 300)
        assert packed.samples == ["a:2"] and packed.tokens == kept.length and packed.first_seen[0, 0] == 0
        (problem,) = packed.problems
        assert problem.where == "a:1" and why in problem.why


def test_lengths_of_samples(processor: Processor) -> None:
    context = processor.config.thinker.text.max_position_embeddings
    for length in (1, context + 1):
        with pytest.raises(InputError, match=f"max_length is {length}; give 2 to {context} tokens"):
            TextRecipe.of(processor, length)


def test_frames_have_few_sizes() -> None:
    assert frame_sizes({1, 2, 3, 4}) == [4, 1] and frame_sizes({100, 128, 64, 63, 40, 31}) == [128, 48]
    assert frame_sizes(set()) == []


def test_coarse_batches_have_fewer_sizes(processor: Processor, data_dir: Path) -> None:
    """Media of each row alone: tokens and positions are the same, and so are the media but for more padding."""
    options = Options(**OPTIONS)
    fine, coarse = (TextRecipe.of(processor, 300, options=options, coarse=wide) for wide in (False, True))
    for name in ("picture", "pictures", "sound", "video"):
        ours, theirs = (r.collate([r.samples(ROWS[name], data_dir, "a:1")], 1, 300) for r in (fine, coarse))
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.position_ids, theirs.position_ids)
        assert ours.media is not None and theirs.media is not None
        (groups, audio, *_), (wide_groups, wide_audio, *_) = ours.media, theirs.media
        assert [len(grid) for _, grid in wide_groups] == [32] * len(wide_groups)
        assert all(patches.shape[1] in (16 * 4, 64 * 4) for patches, _ in wide_groups)
        for patches, grid in groups:
            for frame, (h, w) in zip(patches, grid, strict=True):
                found = [
                    other
                    for wide, sizes in wide_groups
                    for other, size in zip(wide, sizes, strict=True)
                    if tuple(size) == (h, w) and np.array_equal(other[: h * w], frame[: h * w])
                ]
                assert found or not h
        if audio is not None:
            assert wide_audio[0].shape[0] == 32 and np.array_equal(wide_audio[0][: len(audio[0])], audio[0])
            assert not wide_audio[1][len(audio[0]) :].any()


def test_a_recipe_crosses_to_another_process(recipe: TextRecipe, data_dir: Path) -> None:
    other = pickle.loads(pickle.dumps(recipe))
    for row in ROWS.values():
        ours, theirs = (r.samples(row, data_dir, "a:1")[0] for r in (recipe, other))
        assert np.array_equal(ours.token_ids, theirs.token_ids) and np.array_equal(ours.learned, theirs.learned)


def test_thinking_reaches_the_template(processor: Processor, data_dir: Path) -> None:
    assert TextRecipe.of(processor, 100, enable_thinking=True, options=Options()).replies.enable_thinking
