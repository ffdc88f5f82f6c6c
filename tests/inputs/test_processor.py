"""Whole batches against transformers' processor and get_rope_index, rows against themselves alone, and bad input."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.inputs.audio import log_mel
from omni_jax.inputs.image import patchify_image
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.video import load_video, patchify_video, video_audio
from tests.helpers.processing import Asked, patches_at, theirs, user
from tests.inputs.rope_reference import rope_index

VARIANTS = ("tiny", "small", "odd")
rng = np.random.default_rng(0)
PICTURE = rng.integers(0, 256, (90, 150, 3), np.uint8)
TALL = rng.integers(0, 256, (210, 64, 3), np.uint8)
CLIP = rng.integers(0, 256, (5, 48, 64, 3), np.uint8)
SHORT = rng.integers(0, 256, (2, 64, 48, 3), np.uint8)
SOUND = (0.2 * rng.standard_normal(21_000)).astype(np.float32)
BLIP = (0.2 * rng.standard_normal(4_000)).astype(np.float32)


@pytest.fixture(scope="module")
def config_of(checkpoints):
    return cache(lambda variant: json.loads((checkpoints(variant) / "config.json").read_text()))


@pytest.fixture(scope="module")
def processor_of(checkpoints, config_of):
    return cache(lambda variant: Processor.from_dir(checkpoints(variant), OmniConfig.from_hf(config_of(variant))))


def text(words):
    return {"type": "text", "text": words}


def image(array):
    return {"type": "image", "image": array}


def audio(samples):
    return {"type": "audio", "audio": samples, "sampling_rate": 16_000}


def video(frames, fps):
    return {"type": "video", "video": frames, "fps": fps}


def asked_of(processor, rows, use_audio_in_video):
    """The media of conversations in the reference's form; video grids are ours, which test_video holds to account."""
    asked = Asked()
    for part in (part for row in rows for message in row if message["content"] for part in message["content"]):
        kind = part["type"] if isinstance(part, dict) else "text"
        if kind == "image":
            asked.images.append(part["image"])
        elif kind == "audio":
            asked.sounds.append(part["audio"])
            asked.sources.append(None)
        elif kind == "video":
            clip = load_video(part["video"], processor.video_settings, part.get("fps"))
            _, grid, _ = patchify_video(clip, processor.video_settings)
            sound = video_audio(part["video"]) if use_audio_in_video else None
            if sound is not None:
                asked.sounds.append(sound)
                asked.sources.append(len(asked.videos))
            asked.videos.append(clip.frames)
            asked.grids.append(grid)
            asked.fps.add(clip.fps)
    return asked


def assert_equal_to_reference(directory, config, processor, rows, use_audio_in_video=False):
    batch = processor.prepare(rows, padding="left", use_audio_in_video=use_audio_in_video)
    asked = asked_of(processor, rows, use_audio_in_video)
    assert len(asked.fps) < 2, "the reference takes one rate for all videos"
    out = theirs(directory, config, asked, rows, use_audio_in_video)
    mask = out["attention_mask"] == 1
    np.testing.assert_array_equal(batch.mask, mask)
    np.testing.assert_array_equal(batch.token_ids[mask], out["input_ids"][mask])
    positions, deltas = rope_index(
        config["thinker_config"],
        out["input_ids"],
        out["attention_mask"],
        images=out.get("image_grid_thw"),
        videos=out.get("video_grid_thw"),
        seconds_per_grid=np.array(out["video_second_per_grid"], np.float32) if asked.videos else None,
        mel_frames=out["feature_attention_mask"].sum(-1) if asked.sounds else None,
        use_audio_in_video=use_audio_in_video,
    )
    np.testing.assert_array_equal(batch.position_ids[:, mask], positions[:, mask])
    np.testing.assert_array_equal(batch.rope_delta, deltas)
    if asked.videos:
        frame = processor.video_settings.frame
        assert out["video_limits"].tolist() == [frame.min_pixels, frame.max_pixels]
    return batch, out


def mels_at(batch, b):
    """The mel float32 [M, frames] that the audio tokens of row b lead to, all clips one after another."""
    chunks = list(dict.fromkeys((batch.audio_index[b][batch.audio_index[b] >= 0] // 13).tolist()))
    mel = batch.audio.mel.reshape(-1, *batch.audio.mel.shape[2:])
    return np.concatenate([mel[c][:, : batch.audio.frames.reshape(-1)[c]] for c in chunks], axis=1)


CONVERSATIONS = {
    "text": user(text("What is this?")),
    "string": [{"role": "user", "content": "Just text"}],
    "turns": [
        {"role": "system", "content": "You see and hear."},
        {"role": "user", "content": [image(PICTURE), text("What is it?")]},
        {"role": "assistant", "content": "Noise."},
        {"role": "user", "content": [text("And this? "), audio(SOUND), image(TALL), text("?")]},
    ],
    "picture": user(image(PICTURE), text("Describe.")),
    "two pictures": user(image(PICTURE), image(TALL), text("Compare.")),
    "sound": user(text("Listen: "), audio(SOUND)),
    "two sounds": user(audio(BLIP), text("or"), audio(SOUND), text("?")),
    "video": user(video(CLIP, 1.7), text("What happens?")),
    "two videos": user(video(SHORT, 1.7), text("then"), video(CLIP, 1.7), text("?")),
    "everything": user(text("a"), image(TALL), video(CLIP, 1.7), audio(SOUND), text("b"), audio(BLIP), image(PICTURE)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_one_conversation(checkpoints, config_of, processor_of, variant, name):
    processor = processor_of(variant)
    merge = processor.config.thinker.vision.spatial_merge_size
    row = CONVERSATIONS[name]
    batch, out = assert_equal_to_reference(checkpoints(variant), config_of(variant), processor, [row])
    kinds = [part["type"] for m in row if isinstance(m["content"], list) for part in m["content"]]
    if "image" in kinds and "video" not in kinds:
        np.testing.assert_allclose(patches_at(batch, 0, merge), out["pixel_values"], atol=1e-6)
    if "audio" in kinds:
        lengths = out["feature_attention_mask"].sum(-1)
        expected = [mel[:, :n] for mel, n in zip(out["input_features"], lengths, strict=True)]
        ours = np.split(mels_at(batch, 0), np.cumsum(lengths)[:-1], axis=1)
        for mine, mel in zip(ours, expected, strict=True):
            # The reference's last frame of the shorter clips is made of the batch's padding.
            np.testing.assert_allclose(mine[:, :-1], mel[:, :-1], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_different_media(checkpoints, config_of, processor_of, variant):
    rows = [CONVERSATIONS[name] for name in ("two pictures", "string", "everything", "two sounds", "video", "turns")]
    assert_equal_to_reference(checkpoints(variant), config_of(variant), processor_of(variant), rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_in_video(checkpoints, config_of, processor_of, data_dir, variant):
    """Every video with its own sound, pictures and other sounds around it."""
    film = {"type": "video", "video": str(data_dir / "hello_with_speech.mp4")}
    rows = [
        user(audio(BLIP), text("x"), film, image(TALL), text("y"), audio(SOUND)),
        user(text("Who speaks?"), film, text("and"), film),
    ]
    directory, processor = checkpoints(variant), processor_of(variant)
    batch, _ = assert_equal_to_reference(directory, config_of(variant), processor, rows, use_audio_in_video=True)
    track = log_mel(video_audio(film["video"]), processor.audio_settings)
    expected = [log_mel(BLIP, processor.audio_settings), track, log_mel(SOUND, processor.audio_settings)]
    np.testing.assert_array_equal(mels_at(batch, 0), np.concatenate(expected, axis=1))
    np.testing.assert_array_equal(mels_at(batch, 1), np.concatenate([track, track], axis=1))


def test_features_stand_where_their_tokens_are(processor_of):
    """Pictures, frames and clips of several rows, sizes and groups are each found from their own placeholders."""
    processor = processor_of("small")
    rows = [CONVERSATIONS[name] for name in ("everything", "text", "two videos", "two sounds")]
    batch = processor.prepare(rows)
    still = [patchify_image(array, processor.image_settings)[0] for array in (TALL, PICTURE)]
    clips = [
        patchify_video(load_video(frames, processor.video_settings, 1.7), processor.video_settings)[0]
        for frames in (CLIP, SHORT)
    ]
    mels = [log_mel(samples, processor.audio_settings) for samples in (SOUND, BLIP)]
    np.testing.assert_array_equal(patches_at(batch, 0, 3), np.concatenate([still[0], clips[0], still[1]]))
    np.testing.assert_array_equal(patches_at(batch, 2, 3), np.concatenate([clips[1], clips[0]]))
    np.testing.assert_array_equal(mels_at(batch, 0), np.concatenate(mels, axis=1))
    np.testing.assert_array_equal(mels_at(batch, 3), np.concatenate(mels[::-1], axis=1))
    thinker = processor.config.thinker
    visual = np.isin(batch.token_ids, (thinker.image_token_id, thinker.video_token_id))
    np.testing.assert_array_equal(batch.visual_index >= 0, visual)
    np.testing.assert_array_equal(batch.audio_index >= 0, batch.token_ids == thinker.audio_token_id)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_does_not_depend_on_its_neighbours(processor_of, padding):
    processor = processor_of("tiny")
    names = ("everything", "string", "two pictures", "two sounds", "turns")
    batch = processor.prepare([CONVERSATIONS[name] for name in names], padding=padding)
    for b, name in enumerate(names):
        alone, mask = processor.prepare(CONVERSATIONS[name]), batch.mask[b]
        assert alone.mask.all()
        assert mask[-1 if padding == "left" else 0] and mask.sum() == alone.mask.sum()
        np.testing.assert_array_equal(batch.token_ids[b, mask], alone.token_ids[0])
        np.testing.assert_array_equal(batch.position_ids[:, b, mask], alone.position_ids[:, 0])
        assert batch.rope_delta[b] == alone.rope_delta[0]
        if alone.vision:
            np.testing.assert_array_equal(patches_at(batch, b, 2), patches_at(alone, 0, 2))
        if alone.audio is not None:
            np.testing.assert_array_equal(mels_at(batch, b), mels_at(alone, 0))


def test_shapes_and_types(processor_of):
    batch = processor_of("odd").prepare([CONVERSATIONS["picture"], CONVERSATIONS["sound"]])
    B, T = batch.token_ids.shape
    assert B == 2 and batch.mask.shape == batch.visual_index.shape == batch.audio_index.shape == (B, T)
    assert batch.position_ids.shape == (3, B, T) and batch.rope_delta.shape == (B,)
    types = [array.dtype for array in (batch.token_ids, batch.mask, batch.position_ids, batch.rope_delta)]
    assert types == [np.int32, np.bool_, np.float32, np.float32]
    assert batch.visual_index.dtype == batch.audio_index.dtype == np.int32
    plain = processor_of("odd").prepare(CONVERSATIONS["text"])
    assert plain.vision == () and plain.audio is None and (plain.visual_index == -1).all()


def test_silent_video_among_sounding_ones(processor_of, data_dir):
    """transformers counts no silent video under use_audio_in_video; here it is a video like any other (VeOmni#493)."""
    processor = processor_of("tiny")
    silent = {"type": "video", "video": str(data_dir / "hello_silent.mp4")}
    sounding = {"type": "video", "video": str(data_dir / "hello_with_speech.mp4")}
    mixed = processor.prepare(user(silent, text("a"), sounding, image(TALL)), use_audio_in_video=True)
    parts = [user(silent), user(sounding), user(image(TALL))]
    alone = processor.prepare(parts, use_audio_in_video=True, add_generation_prompt=False)
    thinker = processor.config.thinker
    media = (thinker.image_token_id, thinker.video_token_id, thinker.audio_token_id)
    together = mixed.position_ids[:, 0, np.isin(mixed.token_ids[0], media)]
    apart = [alone.position_ids[:, b, np.isin(alone.token_ids[b], media) & alone.mask[b]] for b in range(3)]
    at = 0
    for positions in apart:
        here = together[:, at : at + positions.shape[1]]
        np.testing.assert_allclose(here - here[:, :1], positions - positions[:, :1], atol=1e-3)
        at += positions.shape[1]
    assert at == together.shape[1]
    deaf = processor.prepare(user(silent), use_audio_in_video=False)
    np.testing.assert_array_equal(
        deaf.position_ids, processor.prepare(user(silent), use_audio_in_video=True).position_ids
    )
    assert deaf.audio is None


def test_a_video_is_deaf_unless_asked(processor_of, data_dir):
    film = user({"type": "video", "video": (data_dir / "hello_with_speech.mp4").read_bytes()})
    batch = processor_of("tiny").prepare(film)
    assert batch.audio is None
    assert processor_of("tiny").prepare(film, use_audio_in_video=True).audio is not None


def test_frames_per_second(processor_of, data_dir):
    """The call's rate holds for videos that do not state their own, and time in positions is time in the video."""
    processor = processor_of("tiny")
    path = str(data_dir / "hello_320x180_aac.mp4")
    thinker = processor.config.thinker

    def steps(part, **settings):
        batch = processor.prepare(user(part), **settings)
        times = batch.position_ids[0, 0, batch.token_ids[0] == thinker.video_token_id]
        return np.unique(np.diff(np.unique(times)).round(2)).tolist()

    slow, fast = steps({"type": "video", "video": path}, fps=1.0), steps({"type": "video", "video": path}, fps=4.0)
    assert slow != fast
    assert steps({"type": "video", "video": path, "fps": 4.0}, fps=1.0) == fast
    assert steps(video(CLIP, 2.0)) == [thinker.position_id_per_seconds]


def test_settings_of_the_template(processor_of):
    processor = processor_of("tiny")
    bare = processor.prepare(CONVERSATIONS["text"], add_generation_prompt=False)
    full = processor.prepare(CONVERSATIONS["text"])
    told = processor.prepare(CONVERSATIONS["text"], tools=[{"name": "f"}])
    assert bare.token_ids.shape[1] < full.token_ids.shape[1] < told.token_ids.shape[1]


def test_raw_prompts(processor_of):
    processor = processor_of("tiny")
    batch = processor.prepare_text(
        ["<|im_start|>user\nhi", "a longer prompt than that, in plain words"], padding="left"
    )
    assert batch.token_ids[0, batch.mask[0]].tolist() == processor.tokenizer.encode("<|im_start|>user\nhi")
    np.testing.assert_array_equal(batch.position_ids[1, 1], np.arange(batch.token_ids.shape[1]))
    assert not batch.rope_delta.any()
    assert processor.prepare_text("one").token_ids.shape[0] == 1


def test_typed_placeholders_are_text(processor_of):
    processor = processor_of("tiny")
    batch = processor.prepare(user(image(TALL), text("<|image_pad|><|audio_pad|><|vision_start|>")))
    shown = processor.tokenizer.decode(batch.token_ids[0][batch.visual_index[0] < 0], skip_special=False)
    assert "<|vision_end|><|image_pad|><|audio_pad|><|vision_start|>" in shown


BAD_INPUTS = {
    "no conversations": ([], {}, "^messages is empty"),
    "an empty conversation": ([[]], {}, "messages is empty"),
    "a row among rows": ([user(text("a")), [{"role": "robot", "content": "a"}]], {}, "row 1: message 0 has the role"),
    "padding": (user(text("a")), {"padding": "both"}, "padding 'both'; choose"),
    "missing file": (
        user(text("a"), {"type": "image", "image": "/no/such.png"}),
        {},
        "message 0, part 1: image.*no such",
    ),
    "remote file": (user({"type": "audio", "audio": "https://a.org/b.wav"}), {}, "part 0: .*nothing is fetched"),
    "no picture": (user({"type": "image", "image": b"GIF but not quite"}), {}, "part 0: image of 17 bytes"),
    "no sound": (user({"type": "audio", "audio": b"RIFFnothing"}), {}, "part 0: audio of 11 bytes"),
    "no video": (user({"type": "video", "video": b"nothing at all"}), {}, "part 0: video of 14 bytes"),
    "sound without rate": (user({"type": "audio", "audio": SOUND}), {}, "part 0: .*sampling_rate"),
    "video without rate": (user({"type": "video", "video": CLIP}), {}, "part 0: .*fps"),
    "too short": (user(audio(SOUND[:100])), {}, "part 0: .*at least 201"),
    "NaN": (user(audio(np.full(900, np.nan, np.float32))), {}, "part 0: .*NaN"),
    "float picture": (user(image(PICTURE / 255)), {}, "part 0: .*uint8"),
    "a strip": (user(image(np.zeros((2, 900, 3), np.uint8))), {}, "part 0: .*more than 200 times"),
    "rate of the call": (user({"type": "video", "video": CLIP}), {"fps": float("nan")}, "the call: 'fps' is nan"),
    "too much text": (user(text("word " * 40_000)), {}, "exceed the context of 32768"),
    "no room to answer": (user(text("a")), {"max_new_tokens": 32_760}, "tokens and 32760 new ones exceed the context"),
    "surrogates": (user(text("\ud800")), {}, "surrogate"),
    "tools": (user(text("a")), {"tools": "f"}, "tools of type str"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(processor_of, name):
    messages, settings, message = BAD_INPUTS[name]
    with pytest.raises(InputError, match=message):
        processor_of("tiny").prepare(messages, **settings)


def test_bad_raw_prompts(processor_of):
    for prompts, message in (("", "the prompt is empty"), ([], "no conversations"), ("<|image_pad|>", "no media")):
        with pytest.raises(InputError, match=message):
            processor_of("tiny").prepare_text(prompts)


def test_the_context_is_counted_exactly(processor_of):
    processor = processor_of("tiny")
    n = processor.prepare(CONVERSATIONS["text"]).token_ids.shape[1]
    context = processor.config.thinker.text.max_position_embeddings
    processor.prepare(CONVERSATIONS["text"], max_new_tokens=context - n)
    with pytest.raises(InputError, match=f"{n} tokens and {context - n + 1} new ones"):
        processor.prepare(CONVERSATIONS["text"], max_new_tokens=context - n + 1)


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A checkpoint's small files, to damage."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(checkpoints("tiny") / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [None, "{", ""])
def test_unreadable_settings(copy, config_of, content):
    path = copy / "preprocessor_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match="preprocessor_config.json: .*copy it from the original checkpoint"):
        Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_settings_in_other_encodings(copy, config_of, processor_of, encoding):
    path = copy / "preprocessor_config.json"
    path.write_bytes(path.read_text().encode(encoding))
    processor = Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))
    assert processor.image_settings == processor_of("tiny").image_settings


def test_settings_as_transformers_saves_them(copy, config_of, processor_of):
    path = copy / "preprocessor_config.json"
    values = json.loads(path.read_text())
    saved = {
        "processor_class": "Qwen3OmniMoeProcessor",
        "image_processor": json.loads(Qwen2VLImageProcessorPil.from_dict(values).to_json_string()),
        "feature_extractor": WhisperFeatureExtractor.from_dict(values).to_dict(),
    }
    assert "min_pixels" not in saved["image_processor"]
    saved["feature_extractor"]["min_pixels"] = 1
    (copy / "processor_config.json").write_text(json.dumps(saved))
    path.unlink()
    processor, expected = Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny"))), processor_of("tiny")
    assert processor.image_settings == expected.image_settings
    assert processor.audio_settings == expected.audio_settings
    saved["image_processor"]["image_std"] = [0.5, 0.5]
    (copy / "processor_config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"^processor_config.json: 'image_std'"):
        Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))


def _with_size(copy, size):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))


def test_limits_of_the_tokenizer_hold_for_pictures_and_frames(copy, config_of, processor_of):
    """As in the reference, which passes them to both, and above all else that the files say."""
    _with_size(copy, {"shortest_edge": 3136, "longest_edge": 16_384})
    other = {"size": {"shortest_edge": 1, "longest_edge": 4096}}
    (copy / "video_preprocessor_config.json").write_text(json.dumps(other))
    processor = Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))
    rows = [user(video(CLIP, 1.7), image(np.tile(TALL, (1, 2, 1))), text("What happens?"))]
    batch, out = assert_equal_to_reference(copy, config_of("tiny"), processor, rows)
    assert out["video_limits"].tolist() == [3136, 16_384]
    np.testing.assert_allclose(patches_at(batch, 0, 2)[-out["pixel_values"].shape[0] :], out["pixel_values"], atol=1e-6)
    assert [item.grid for item in batch.items[0]] == [(3, 4, 4), (1, 10, 6)]
    unchanged = processor_of("tiny").prepare(rows)
    assert [item.grid for item in unchanged.items[0]] == [(3, 20, 28), (1, 14, 8)]


@pytest.mark.parametrize(
    "size, message",
    [
        (448, "'size' is 448, not a section"),
        ({"shortest_edge": 3136}, "'size.longest_edge' is missing"),
        ({"shortest_edge": 4096, "longest_edge": 3136}, "min_pixels 4096 exceeds max_pixels 3136"),
        ({"shortest_edge": 1, "longest_edge": 1000}, "less than one token"),
    ],
)
def test_limits_of_the_tokenizer_that_cannot_be(copy, config_of, size, message):
    _with_size(copy, size)
    with pytest.raises(ConfigError, match=f"^tokenizer_config.json: .*{message}"):
        Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))


@pytest.mark.parametrize("name", ["patch_size", "temporal_patch_size", "merge_size", "feature_size"])
def test_settings_of_another_model(copy, config_of, name):
    path = Path(copy / "preprocessor_config.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {name: values[name] + 1}))
    with pytest.raises(ConfigError, match=f"'{name}' is {values[name] + 1}, config.json says {values[name]}"):
        Processor.from_dir(copy, OmniConfig.from_hf(config_of("tiny")))


def test_a_tokenizer_of_another_model(copy, config_of):
    config = OmniConfig.from_hf(config_of("tiny"))
    text = replace(config.thinker.text, vocab_size=300)
    with pytest.raises(CheckpointError, match="300 rows"):
        Processor.from_dir(copy, replace(config, thinker=replace(config.thinker, text=text)))
