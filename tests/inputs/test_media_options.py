"""Media options through whole prompts: what they change, who wins, and what is refused before anything is decoded."""

import json

import numpy as np
import pytest
from PIL import Image

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.inputs import memory
from omni_jax.inputs import processor as module
from omni_jax.inputs.image import resize
from omni_jax.inputs.options import Options, read_options
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.video import video_audio
from tests.helpers.processing import Asked, patches_at, theirs, user
from tests.helpers.videos import encode
from tests.inputs.rope_reference import rope_index

rng = np.random.default_rng(0)
PICTURE = rng.integers(0, 256, (400, 640, 3), np.uint8)
SOUND = (0.2 * rng.standard_normal(32_000)).astype(np.float32)
AREA = 32 * 32


@pytest.fixture(scope="module")
def config(checkpoints):
    return json.loads((checkpoints("tiny") / "config.json").read_text())


@pytest.fixture(scope="module")
def processor(checkpoints, config):
    return Processor.from_dir(checkpoints("tiny"), OmniConfig.from_hf(config))


@pytest.fixture(scope="module")
def film(data_dir):
    return str(data_dir / "hello_with_speech.mp4")


def items(processor, part, **settings):
    (item,) = processor.prepare(user(part), **settings).items[0]
    return item


IMAGE = {"type": "image", "image": PICTURE}
# An option, and what it makes of the picture: the grid in patches of 16.
IMAGE_GRIDS = (
    ({}, (1, 22, 34)),  # this checkpoint's own limits
    ({"max_pixels": 64 * AREA}, (1, 12, 20)),
    ({"min_pixels": 500 * AREA}, (1, 36, 58)),
    ({"resized_height": 100, "resized_width": 200}, (1, 6, 12)),
)


@pytest.mark.parametrize("options, grid", IMAGE_GRIDS)
def test_pictures(processor, options, grid):
    assert items(processor, IMAGE | options).grid == grid
    assert items(processor, IMAGE, media=options).grid == grid
    assert items(processor, IMAGE | options, media={"max_pixels": 16 * AREA}).grid == (grid if options else (1, 6, 10))


def test_ids_positions_and_patches_are_the_references(checkpoints, config, processor):
    part = IMAGE | {"max_pixels": 64 * AREA}
    still = np.repeat(PICTURE[None], 4, axis=0)
    clip = {"type": "video", "video": still, "fps": 2.0, "min_pixels": 16 * AREA, "max_pixels": 40 * AREA}
    rows = [user(part, clip, {"type": "audio", "audio": SOUND, "sampling_rate": 16_000, "audio_end": 1.0})]
    batch = processor.prepare(rows, padding="left")
    small = resize(PICTURE, 6 * 32, 10 * 32)
    asked = Asked([small], [still], [(2, 10, 16)], {2.0}, [SOUND[:16_000]], [None])
    out = theirs(checkpoints("tiny"), config, asked, rows)
    np.testing.assert_array_equal(batch.token_ids, out["input_ids"])
    positions, deltas = rope_index(
        config["thinker_config"],
        out["input_ids"],
        out["attention_mask"],
        images=out["image_grid_thw"],
        videos=out["video_grid_thw"],
        seconds_per_grid=np.array(out["video_second_per_grid"], np.float32),
        mel_frames=out["feature_attention_mask"].sum(-1),
        use_audio_in_video=False,
    )
    np.testing.assert_array_equal(batch.position_ids, positions)
    np.testing.assert_array_equal(batch.rope_delta, deltas)
    assert batch.items[0][0].grid == tuple(out["image_grid_thw"][0])
    np.testing.assert_allclose(patches_at(batch, 0, 2)[: 12 * 20], out["pixel_values"], atol=1e-6)


VIDEO_GRIDS = (
    ({}, 7),
    ({"fps": 1.0}, 3),
    ({"nframes": 4}, 2),
    ({"max_frames": 8}, 4),
    ({"min_frames": 40}, 20),
    ({"video_start": 2.0, "video_end": 5.0}, 3),
    ({"video_start": 4.0, "nframes": 6}, 3),
)


@pytest.mark.parametrize("options, steps", VIDEO_GRIDS)
def test_frames(processor, film, options, steps):
    part = {"type": "video", "video": film}
    assert items(processor, part | options).grid == (steps, 18, 32)
    assert items(processor, part, media=options).grid == (steps, 18, 32)
    if "nframes" not in options and "fps" not in options:
        assert items(processor, part | options, fps=0.5).seconds_per_grid != items(processor, part).seconds_per_grid


def test_sizes_of_frames(processor, film):
    part = {"type": "video", "video": film, "nframes": 8}
    assert items(processor, part | {"min_pixels": 4 * AREA, "max_pixels": 40 * AREA}).grid == (4, 8, 16)
    assert items(processor, part | {"resized_height": 64, "resized_width": 64}).grid == (4, 4, 4)
    shared = {"min_pixels": 4 * AREA, "total_pixels": 4 * 24 * AREA}  # a quarter of them for each pair
    assert items(processor, part | shared).grid == (4, 6, 12)


def test_a_span_has_the_seconds_and_sound_of_the_span(processor, film):
    part = {"type": "video", "video": film, "video_start": 1.0, "video_end": 3.0, "use_audio_in_video": True}
    item = items(processor, part)
    assert item.seconds_per_grid * item.grid[0] == pytest.approx(61 / 30, abs=1e-3)  # both ends are shown
    assert item.audio_tokens == 26
    assert items(processor, part | {"use_audio_in_video": False}, use_audio_in_video=True).audio_tokens == 0
    whole, cut = video_audio(film), video_audio(film, options=Options(video_start=1.0, video_end=3.0))
    assert cut.size == 32_000
    np.testing.assert_allclose(cut[800:-800], whole[16_800:47_200], atol=1e-3)


def test_spans_of_sound(processor):
    part = {"type": "audio", "audio": SOUND, "sampling_rate": 16_000}
    assert items(processor, part).audio_tokens == 26
    assert items(processor, part | {"audio_start": 0.5, "audio_end": 1.5}).audio_tokens == 13
    assert items(processor, part, media={"audio_start": 1.0}).audio_tokens == 13
    with pytest.raises(InputError, match="no sound from 2 s on; it lasts 2 s"):
        items(processor, part | {"audio_start": 2})


def test_a_list_of_frames(processor, tmp_path):
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(PICTURE).save(paths[-1])
    frames = {
        "type": "video",
        "video": [paths[0], PICTURE, Image.open(paths[2]), (tmp_path / "3.png").read_bytes(), paths[4]],
    }
    item = items(processor, frames)
    assert item.grid == (3, 24, 40) and item.seconds_per_grid == 1.0  # two frames a second, the last one twice
    assert items(processor, frames | {"sample_fps": 4}).seconds_per_grid == 0.5
    assert items(processor, frames | {"fps": np.int64(4)}).seconds_per_grid == 0.5
    assert items(processor, frames, fps=1).seconds_per_grid == 1.0  # the call's is of files
    assert items(processor, frames, media={"nframes": 2, "video_start": 1}).grid == (3, 24, 40)
    with pytest.raises(InputError, match="'nframes' is of files"):
        items(processor, frames | {"nframes": 2})


def never(*_args, **_settings):
    raise AssertionError("something was decoded")


def test_the_context_is_planned_before_frames_are_decoded(processor, film, monkeypatch):
    monkeypatch.setattr("omni_jax.inputs.video._decoded", never)
    monkeypatch.setattr(module, "load_image", never)
    with pytest.raises(InputError, match=r"message 0, part 0: .* 210 frames of 1184 x 672 pixels take 81585 tokens"):
        items(processor, {"type": "video", "video": film, "nframes": 210, "min_pixels": 768 * AREA})
    big = {"type": "image", "image": Image.new("RGB", (3000, 3000))}
    with pytest.raises(InputError, match="message 0, part 3: with it, media take 34596 tokens of 32.* left"):
        processor.prepare(user(*[big] * 8), media={"max_pixels": 9e6})
    with pytest.raises(AssertionError, match="something was decoded"):
        processor.prepare(user(*[big] * 3), media={"max_pixels": 9e6})


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_long_file_is_refused_by_its_header(processor, tmp_path, monkeypatch, kind):
    data = encode(tmp_path / f"a.{kind}", [90] * 210)
    monkeypatch.setattr("omni_jax.inputs.video.read_timeline", never)
    with pytest.raises(InputError, match=r"210 frames of \d+ x \d+ pixels take \d{5} tokens"):
        items(processor, {"type": "video", "video": data, "nframes": 210, "min_pixels": 768 * AREA})


def test_the_context_leaves_room_for_the_text(processor, film):
    part = {"type": "video", "video": film}
    n = processor.prepare(user(part)).token_ids.shape[1]
    context = processor.config.thinker.text.max_position_embeddings
    processor.prepare(user(part), max_new_tokens=context - n)
    with pytest.raises(InputError, match="tokens, and 1007 are left of the context"):
        processor.prepare(user(part), max_new_tokens=context - n + 1)


def test_memory_is_planned_before_it_is_taken(processor, film, monkeypatch):
    monkeypatch.setattr("omni_jax.inputs.video._decoded", never)
    monkeypatch.setattr(memory, "_machine", lambda: 50_000_000)
    with pytest.raises(
        InputError, match=r"pictures and videos would take 0\.\d GB of memory and 0\.1 GB are free; send"
    ):
        items(processor, {"type": "video", "video": film})
    monkeypatch.setattr(memory, "_machine", lambda: None)
    monkeypatch.setattr(memory, "_container", lambda: 1000)
    with pytest.raises(InputError, match="0.0 GB are free"):
        processor.prepare([user(IMAGE), user(IMAGE)])
    monkeypatch.setattr(memory, "_container", lambda: None)
    assert memory.available_bytes() is None
    processor.prepare(user(IMAGE))  # where nothing is known, nothing is refused


def test_a_text_that_is_too_long_itself_is_named_before_its_media(processor):
    text = {"type": "text", "text": "word " * 40_000}
    with pytest.raises(InputError, match=r"a prompt of \d+ tokens and 7 new ones exceed the context of 32768; shorten"):
        processor.prepare(user(text, IMAGE), max_new_tokens=7)


STAT = "anon 600\ninactive_file 250\nactive_file 50\ntotal_inactive_file 20\ntotal_active_file 10"


@pytest.mark.parametrize(
    "folder, names, limit, taken, left",
    [
        (".", ("memory.max", "memory.current"), "1000", "900", 400),  # of which 300 are copies of files
        (".", ("memory.max", "memory.current"), "1000", "1400", 0),
        (".", ("memory.max", "memory.current"), "1000", "100", 1000),
        (".", ("memory.max", "memory.current"), "max", "900", None),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "1000", "900", 130),
        ("elsewhere", ("memory.max", "memory.current"), "1000", "900", None),
    ],
)
def test_the_memory_of_a_container(tmp_path, monkeypatch, folder, names, limit, taken, left):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, taken, STAT), strict=True):
        (tmp_path / folder / name).write_text(text + "\n")
    assert memory._container() == left
    monkeypatch.setattr(memory, "_machine", lambda: 700)
    assert memory.available_bytes() == min(700, 700 if left is None else left)


def test_every_row_is_planned_before_one_is_loaded(processor, monkeypatch):
    monkeypatch.setattr(module, "load_image", never)
    with pytest.raises(InputError, match="row 1: message 0, part 0: image '/no/such.png'"):
        processor.prepare([user(IMAGE), user({"type": "image", "image": "/no/such.png"})])


def test_numbers_of_numpy(processor, film):
    part = {"type": "video", "video": film}
    assert items(processor, part, fps=np.int64(1)).grid == items(processor, part, fps=1.0).grid
    assert items(processor, part | {"nframes": np.int32(4)}).grid[0] == 2


@pytest.mark.parametrize(
    "own, call, words",
    [
        (
            {"type": "audio", "audio": SOUND, "sampling_rate": 16_000, "audio_end": 1},
            {"audio_start": 2},
            "'audio_end' of",
        ),
        ({"type": "video", "video": "a.mp4", "video_start": 3}, {"video_end": 2}, "'video_end' of 2 s is not after"),
    ],
)
def test_a_span_of_which_a_part_and_the_call_state_one_end_each(processor, own, call, words):
    with pytest.raises(InputError, match=f"message 0, part 0: {words}"):
        processor.prepare(user(own), media=call)


def test_a_stated_way_to_sample_replaces_the_other():
    assert Options(fps=1.0).over(Options(nframes=4)) == Options(fps=1.0)
    assert Options(nframes=4).over(Options(fps=1.0)) == Options(nframes=4)
    assert Options(max_frames=4).over(Options(fps=1.0)) == Options(fps=1.0, max_frames=4)


def test_the_pixels_of_a_picture_are_planned(processor, monkeypatch):
    """A large picture that becomes a small one takes memory while it is decoded."""
    small = {"type": "image", "image": np.zeros((3000, 3000, 3), np.uint8), "max_pixels": 64 * AREA}
    monkeypatch.setattr(memory, "_container", lambda: None)
    monkeypatch.setattr(memory, "_machine", lambda: 140_000_000)
    with pytest.raises(InputError, match=r"pictures and videos would take 0.2 GB of memory and 0.1"):
        processor.prepare(user(small))
    monkeypatch.setattr(memory, "_machine", lambda: 160_000_000)
    processor.prepare(user(small))


BAD_CALLS = {
    "a list": ({"media": ["nframes"]}, "media is of type list"),
    "an unknown option": ({"media": {"n_frames": 4}}, "unknown option 'n_frames'; did you mean 'nframes'"),
    "both rates": ({"media": {"fps": 2, "nframes": 4}}, "'nframes' and 'fps' contradict"),
    "a rate beside frames": ({"media": {"nframes": 4}, "fps": 2}, "'nframes' and 'fps' contradict"),
    "two rates": ({"media": {"fps": 2}, "fps": 1}, "'fps' is stated twice"),
    "a text": ({"media": {"max_pixels": "1e5"}}, "the call: 'max_pixels' is '1e5'; give a positive number"),
    "a truth": ({"media": {"use_audio_in_video": 1}}, "'use_audio_in_video' is 1; give True or False"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_options_of_a_call(processor, name):
    settings, words = BAD_CALLS[name]
    with pytest.raises(InputError, match=words):
        processor.prepare(user({"type": "text", "text": "hi"}), **settings)


def test_numbers_of_jax_are_numbers():
    import jax.numpy as jnp

    assert read_options({"fps": jnp.float32(2)}, "the call") == read_options({"fps": 2}, "the call")
    assert read_options({"nframes": jnp.int32(4)}, "the call") == read_options({"nframes": 4}, "the call")
