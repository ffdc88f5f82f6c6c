"""The stage sight: the vision encoder learns what lies where in pictures, alone, before the Thinker learns to tell it.

    words/model, begin (first layers) -> labelled pictures -> step -> sight.npz, sight.csv -> sight/model

Linear layers read from each token, and from the mean of all, what labelled.py knows of them; they are dropped
afterwards. A picture teaches much more like this than by the few words of one answer, and costs less. Lines of
sight.csv: step, seconds so far, loss, and the shares of things' colours, of their shapes, of letters and of digits that
are right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import omni_jax
from omni_jax.inputs.image import patchify_frames
from omni_jax.inputs.settings import ImageSettings
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.models.vision import VisionEncoder
from omni_jax.train.optimizer import optimizer_of
from omni_jax.train.saving import save_part
from omni_jax.train.settings import Optimizer
from scripts.nano.labelled import CLASSES, PIXELS, SHARE, UNKNOWN, Labelled, pictures
from scripts.nano.origin import check_origin, model_of
from scripts.nano.rows import Split
from scripts.nano.words import DIGITS
from scripts.stored_state import log_file, restored, take_steps

BATCH = 32
# Batches of the test.
TESTED = 48
# Of the largest picture, which has 96 x 224 pixels.
TOKENS = 21
# Patches of a token.
MERGED = 4
# Of the loss of a token that holds nothing, beside one that holds a thing or a letter.
NOTHING = 0.3
SETTINGS = Optimizer(
    optimizer="muon", learning_rate=5e-3, warmup_ratio=0.01, final_ratio=0.02, weight_decay=0.05, beta2=0.98
)
# The logical axes of the linear layers.
HEADS: dict[str, Any] = {"token": ("embed", "vocab"), "digit": ("embed", "vocab")}
COLUMNS = ("step", "seconds", "loss", "colour", "shape", "letter", "digit")


class Eye(NamedTuple):
    """The vision encoder, and how its pictures are prepared."""

    declaration: Declaration
    settings: ImageSettings


class Rows(NamedTuple):
    """A batch: patches float16 [B, P, patch_dim], grid int32 [B, 2], tokens int32 [B, P / 4, 4], digit int32 [B]."""

    patches: np.ndarray
    grid: np.ndarray
    tokens: np.ndarray
    digit: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """params: of "vision" and of the linear layers, "token" [out, classes of all four] and "digit" [out, 10]."""

    params: dict
    optimizer: Any


def train_sight(directory: Path, steps: int, seconds: float, seed: int, workers: int) -> int:
    """Train up to step `steps`, going on from sight.npz, or for `seconds`: the step. The last one writes sight/model.

    InputError for the state of another training.
    """
    words, file = directory / "words" / "model", directory / "sight.npz"
    origin = {"words/model": model_of(words, "words"), "steps": steps, "seed": seed}
    check_origin(directory, "sight", [file, directory / "sight"], origin)
    eye, vision = beginning(directory / "begin")
    optimizer = optimizer_of(SETTINGS, steps, {**HEADS, "vision": eye.declaration.axes})
    state, begin, spent = restored(file, first_state(vision, optimizer))
    batches = batches_of(directory, eye, seed, workers, begin)
    step = jax.jit(partial(_step, eye.declaration, optimizer))

    def advance(state: State, _: int) -> tuple[State, jax.Array]:
        return step(state, next(batches))

    with log_file(directory / "sight.csv", begin, ",".join(COLUMNS)) as stream:
        log = partial(_write_shares, stream)
        state, taken = take_steps(file, state, range(begin, steps), spent, seconds, advance, log)
    if taken < steps:
        return taken
    save_part("thinker", words, None, {"vision": state.params["vision"]}, directory / "sight" / "model")
    return steps


def tested(directory: Path, seed: int, workers: int) -> dict[str, float]:
    """The shares that are right of pictures with the combinations, fonts and handwriting of the test."""
    eye, vision = beginning(directory / "begin")
    optimizer = optimizer_of(SETTINGS, 1, {**HEADS, "vision": eye.declaration.axes})
    state, _, _ = restored(directory / "sight.npz", first_state(vision, optimizer))
    batches = batches_of(directory, eye, seed, workers, split="test")
    judge = jax.jit(partial(judged, eye.declaration))
    right = np.sum([judge(state.params, rows)[1] for rows in islice(batches, TESTED)], axis=0)
    return dict(zip(COLUMNS[3:], (right[:, 0] / right[:, 1]).tolist(), strict=True))


def beginning(model: Path) -> tuple[Eye, dict]:
    """The vision encoder of a model and its parameters."""
    omni = omni_jax.load(model, parts=("thinker",))
    settings = replace(omni.processor.image_settings, **PIXELS)
    eye = Eye(declare(VisionEncoder, omni.config.thinker.vision), settings)
    return eye, nnx.to_pure_dict(nnx.state(omni.thinker.vision, nnx.Param))


def first_state(vision: dict, optimizer: Any) -> State:
    """The state before the first step: the linear layers are zero."""
    width = vision["merger"]["fc2"]["bias"].shape[0]
    params = {
        "vision": vision,
        "token": jnp.zeros((width, sum(CLASSES))),
        "digit": jnp.zeros((width, len(DIGITS))),
    }
    return State(params, optimizer.init(params))


def batches_of(
    directory: Path, eye: Eye, seed: int, workers: int, begin: int = 0, split: Split = "train"
) -> Iterator[Rows]:
    """Batches of BATCH pictures without end, from number `begin` on."""
    share, skipped = divmod(begin, SHARE // BATCH)
    for made in pictures(directory, split, eye.settings, seed, workers, share):
        for i in range(skipped * BATCH, SHARE, BATCH):
            yield rows_of(made[i : i + BATCH], eye.settings)
        skipped = 0


def rows_of(made: Sequence[Labelled], settings: ImageSettings) -> Rows:
    """A batch of pictures, padded to TOKENS each."""
    count, merged = len(made), settings.merge_size**2
    patches = np.zeros((count, TOKENS * merged, settings.patch_dim), np.float16)
    grid, digit = np.zeros((count, 2), np.int32), np.asarray([one.digit for one in made], np.int32)
    tokens = np.full((count, TOKENS, len(CLASSES)), UNKNOWN, np.int32)
    for i, one in enumerate(made):
        cut, (_, *grid[i]) = patchify_frames(np.stack([one.pixels] * settings.temporal_patch_size), settings)
        patches[i, : len(cut)] = cut
        tokens[i, : one.tokens[..., 0].size] = one.tokens.reshape(-1, len(CLASSES))
    return Rows(patches, grid, tokens, digit)


def judged(encoder: Declaration, params: dict, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """The loss [], and for colours, shapes, letters and digits how many are right and how many there are: [4, 2]."""
    features, deep = bind(encoder, params["vision"])(rows.patches.astype(jnp.float32), rows.grid)
    # As the text model hears of them: its first layers add the deepstack features.
    seen = features + deep.sum(0)
    seen = seen * jax.lax.rsqrt(jnp.mean(jnp.square(seen), axis=-1, keepdims=True) + 1e-6)
    inside = (jnp.arange(seen.shape[1]) < jnp.prod(jnp.asarray(rows.grid), axis=1)[:, None] // MERGED)[..., None]
    mean = jnp.sum(seen * inside, axis=1) / jnp.maximum(inside.sum(1), 1)
    loss, counts = judged_classes(mean @ params["digit"], rows.digit, None)
    right = [counts]
    splits = np.cumsum(CLASSES)[:-1].tolist()
    for i, logits in enumerate(jnp.split(seen @ params["token"], splits, axis=-1)):
        more, counts = judged_classes(logits, rows.tokens[..., i], CLASSES[i] - 1)
        loss, right = loss + more, [*right, counts]
    digit, colour, shape, left, other = right
    return loss, jnp.stack([colour, shape, left + other, digit])


def judged_classes(logits: jax.Array, wanted: Any, nothing: int | None) -> tuple[jax.Array, jax.Array]:
    """The mean loss of known classes int32 [...], and how many are right and how many there are, of things alone."""
    import optax

    known, thing = wanted != UNKNOWN, (wanted != UNKNOWN) & (wanted != nothing)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted, 0))
    share = jnp.where(thing, 1.0, jnp.where(known, NOTHING, 0.0))
    right = thing & (logits.argmax(-1) == wanted)
    return jnp.sum(losses * share) / jnp.maximum(share.sum(), 1), jnp.stack([right.sum(), thing.sum()])


def _step(encoder: Declaration, optimizer: Any, state: State, rows: Rows) -> tuple[State, jax.Array]:
    """One step: the next state, and the loss and the shares that were right, [5]."""
    import optax

    lossy = partial(judged, encoder)
    (loss, right), gradient = jax.value_and_grad(lossy, has_aux=True)(state.params, rows)
    changes, kept = optimizer.update(gradient, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, changes)
    return State(params, kept), jnp.concatenate([loss[None], right[:, 0] / jnp.maximum(right[:, 1], 1)])


def _write_shares(stream: IO[str], number: int, seconds: float, shown: jax.Array) -> None:
    line = ",".join([str(number), str(round(seconds)), *(f"{value:.4f}" for value in np.asarray(shown))])
    print(line, file=stream, flush=True)
    print(line, flush=True)
