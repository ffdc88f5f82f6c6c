"""Labels lie where things and letters are, and the vision encoder learns them, going on after a stop.

Words are set in the font that Pillow brings, so that no package of fonts is needed.
"""

from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from itertools import islice
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import omni_jax
from omni_jax.errors import InputError
from omni_jax.train.optimizer import optimizer_of
from scripts import stored_state
from scripts.nano import labelled, sight
from scripts.nano.labelled import CLASSES, UNKNOWN, Labelled, pictures, tokens_of_letters, tokens_of_things
from scripts.nano.pictures import COLOURS, SHAPES, Thing, render
from scripts.nano.reading import lettered
from scripts.nano.sight import Rows, batches_of, beginning, first_state, judged, judged_classes, rows_of, train_sight
from tests.helpers.fonts import write_font
from tests.nano.small import write_small

RED, RING, NO_LETTER = tuple(COLOURS).index("red"), SHAPES.index("ring"), CLASSES[2] - 1


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that nobody trained, beside a words/model of the same."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("sight")
        model = write_small(folder, monkeypatch)
    (folder / "words").mkdir()
    model.rename(folder / "words" / "model")
    return folder / "begin"


def test_things_are_labelled_where_they_are() -> None:
    things = [Thing("red", "square", 0.1, 0.9, 0.1), Thing("blue", "ring", 0.6, 0.4, 0.1)]
    tokens = tokens_of_things(things, (4, 4))
    assert tokens.shape == (4, 4, 4) and (tokens[..., 2:] == UNKNOWN).all()
    held = np.argwhere(tokens[..., 0] != CLASSES[0] - 1).tolist()
    assert held == np.argwhere(tokens[..., 1] != CLASSES[1] - 1).tolist() == [[1, 2], [3, 0]]
    assert tokens[3, 0, 0] == RED and tokens[1, 2, 1] == RING
    pixels = np.asarray(render(np.full((128, 128, 3), 250, np.uint8), things[:1]))
    assert pixels[int(0.9 * 128), int(0.1 * 128)].tolist() == list(COLOURS["red"])


@pytest.mark.parametrize("varied", [False, True])
def test_letters_are_labelled_where_they_are(varied: bool, tmp_path: Path) -> None:
    picture, lettering = lettered(np.random.default_rng(1), "fog", write_font(tmp_path), varied=varied)
    assert lettering.text == "fog" and len(lettering.edges) == 4 and list(lettering.edges) == sorted(lettering.edges)
    # The ink differs from the paper between the edges alone.
    grey = np.asarray(picture.convert("L"), np.float32)
    changes = grey.std(axis=0) > 25
    inked = np.flatnonzero(changes) / picture.width
    assert abs(inked[0] - lettering.edges[0]) < 0.06 and abs(inked[-1] - lettering.edges[-1]) < 0.06
    rows = np.flatnonzero(grey.std(axis=1) > 25) / picture.height
    assert rows[0] < lettering.middle < rows[-1]
    tokens = tokens_of_letters(lettering, (2, 10))
    row = int(2 * lettering.middle)
    assert (tokens[1 - row] == UNKNOWN).all() and (tokens[..., :2] == UNKNOWN).all()
    read = [letter for letter in tokens[row, :, 2:].ravel().tolist() if letter != NO_LETTER]
    assert [labelled.ascii_lowercase[a] for a, b in zip(read, [-1, *read], strict=False) if a != b] == list("fog")


def test_a_picture_depends_on_its_number_alone(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = BytesIO()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(sheet, "PNG")
    monkeypatch.setattr(labelled, "SHARE", 4)
    monkeypatch.setattr(sight, "SHARE", 4)
    monkeypatch.setattr(sight, "BATCH", 2)
    monkeypatch.setattr(labelled, "digit_picture", lambda *_: sheet.getvalue())
    font = write_font(tmp_path)
    monkeypatch.setattr(labelled, "fonts", lambda split: {"Plain": (font,)})
    monkeypatch.setattr(labelled, "ProcessPoolExecutor", _Here)
    eye, _ = beginning(begun)
    first, second = islice(pictures(tmp_path, "train", eye.settings, 3, 1), 2)
    assert [one.digit >= 0 for one in first] == [False, False, True, False]
    for one in first + second:
        assert one.tokens.shape[:2] == (one.pixels.shape[0] // 32, one.pixels.shape[1] // 32)
        assert one.tokens[..., 0].size <= sight.TOKENS
    (later,) = islice(pictures(tmp_path, "train", eye.settings, 3, 1, share=1), 1)
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(second, later, strict=True))
    assert not np.array_equal(first[0].pixels, second[2].pixels)
    # The second batch of the second share.
    rows = next(batches_of(tmp_path, eye, 3, 1, begin=3))
    wanted = rows_of(second[2:], eye.settings)
    assert np.array_equal(rows.patches, wanted.patches) and rows.digit.tolist() == wanted.digit.tolist()


def test_only_things_count_as_right() -> None:
    wanted = jnp.asarray([0, 1, 2, 2, UNKNOWN])
    logits = 9.0 * jax.nn.one_hot(jnp.asarray([0, 2, 2, 1, 0]), 3)
    loss, right = judged_classes(logits, wanted, nothing=2)
    assert right.tolist() == [1, 2]
    each = -jax.nn.log_softmax(logits)[jnp.arange(4), wanted[:4]]
    shares = np.array([1, 1, sight.NOTHING, sight.NOTHING])
    np.testing.assert_allclose(loss, (each * shares).sum() / shares.sum(), rtol=1e-6)
    assert judged_classes(logits, jnp.full(5, UNKNOWN), None)[1].tolist() == [0, 0]


def test_padding_is_not_seen(begun: Path) -> None:
    eye, vision = beginning(begun)
    params = first_state(
        vision, optimizer_of(sight.SETTINGS, 1, {**sight.HEADS, "vision": eye.declaration.axes})
    ).params
    draw = np.random.default_rng(0)
    params |= {"digit": jnp.asarray(draw.normal(size=params["digit"].shape), jnp.float32)}
    rows = rows_of([digit_of(draw, 64, 7)], eye.settings)
    alone, beside = (
        judged(eye.declaration, params, Rows(rows.patches[:, : 4 * n], rows.grid, rows.tokens[:, :n], rows.digit))
        for n in (4, sight.TOKENS)
    )
    np.testing.assert_allclose(alone[0], beside[0], rtol=1e-5)
    assert alone[1].tolist() == beside[1].tolist() and alone[1][3].tolist()[1] == 1


def test_training_goes_on_after_a_stop(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    made = [digit_of(draw, 64, digit) for digit in range(8)]
    monkeypatch.setattr(sight, "SHARE", 8)
    monkeypatch.setattr(sight, "BATCH", 2)
    monkeypatch.setattr(stored_state, "LOG_STEPS", 1)
    monkeypatch.setattr(sight, "pictures", lambda *_: iter([made]))
    whole, halves = (copytree(begun.parent, tmp_path / name) for name in ("whole", "halves"))
    assert train_sight(whole, 3, 1e9, 0, 1) == 3
    assert train_sight(halves, 3, 0, 0, 1) == 1 and not (halves / "sight" / "model").exists()
    with pytest.raises(InputError, match="steps changed from 3 to 4"):
        train_sight(halves, 4, 1e9, 0, 1)
    assert train_sight(halves, 3, 1e9, 0, 1) == 3
    lines = [[float(x) for x in line.split(",")[2:]] for line in (halves / "sight.csv").read_text().splitlines()[1:]]
    assert lines == [
        [float(x) for x in line.split(",")[2:]] for line in (whole / "sight.csv").read_text().splitlines()[1:]
    ]
    assert len(lines) == 3 and lines[0][0] != lines[-1][0]
    made, other, words = (
        omni_jax.load(folder, parts=("thinker",)).thinker
        for folder in (whole / "sight/model", halves / "sight/model", begun.parent / "words/model")
    )
    patch = "vision.patch_embed.weight"
    same = [np.array_equal(array(made, patch), array(one, patch)) for one in (other, words)]
    assert same == [True, False] and np.array_equal(array(made, "embed"), array(words, "embed"))
    rmtree(halves / "words" / "model")
    copytree(halves / "sight" / "model", halves / "words" / "model")
    with pytest.raises(InputError, match="sight.npz is outdated: words/model changed; delete .*npz and .*sight to"):
        train_sight(halves, 3, 1e9, 0, 1)


def array(module: Any, name: str) -> np.ndarray:
    """A parameter [...] by its path."""
    for part in name.split("."):
        module = getattr(module, part)
    return np.asarray(module[...])


def digit_of(draw: np.random.Generator, side: int, digit: int) -> Labelled:
    """Noise uint8 [side, side, 3] that is labelled as a digit."""
    pixels = draw.integers(0, 256, (side, side, 3)).astype(np.uint8)
    return Labelled(pixels, np.full((side // 32, side // 32, len(CLASSES)), UNKNOWN, np.int8), digit)


class _Here:
    """A pool that does the work in this process."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def submit(self, act: Callable[..., Any], *arguments: Any) -> Future:
        """Call at once."""
        done: Future = Future()
        done.set_result(act(*arguments))
        return done

    def shutdown(self, cancel_futures: bool) -> None:
        """Nothing is left."""
