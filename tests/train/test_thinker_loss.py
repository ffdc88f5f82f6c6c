"""The Thinker's loss and the gradient of every parameter against transformers, and what must not change them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.inputs.batch import Batch
from omni_jax.models.output import ExpertLoad
from omni_jax.models.param import Declaration, declare, project
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.sharding import make_mesh, shardings
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.losses.thinker import load_balancing_loss, thinker_loss, tokens_of_samples
from omni_jax.train.objective import Loss
from omni_jax.weights.mesh_text import parse_mesh
from omni_jax.weights.trees import flatten
from tests.helpers.arrays import close
from tests.helpers.prompts import PROMPTS
from tests.helpers.training import (
    COEFFICIENT,
    declaration_of,
    each_leaf,
    labels_of,
    pack,
    reference_gradients,
    reference_loss,
    text_batch,
)
from tests.parity import audio_part, image_part, reference_inputs, user

TOLERANCE = 1e-4
Trained = tuple[Loss, dict]


def trained(
    declaration: Declaration, params: dict, batch: TextBatch, frozen: dict | None = None, **settings: Any
) -> Trained:
    """The loss, and the gradient of its mean."""

    def mean(params: dict, batch: TextBatch) -> tuple[jax.Array, Loss]:
        loss = thinker_loss(params, frozen or {}, batch, declaration=declaration, **settings)
        return loss.total / loss.weight, loss

    (_, loss), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, batch)
    return loss, gradient


def equal_gradients(declaration: Declaration, got: dict, want: dict, relative: float = TOLERANCE) -> None:
    """Equal to `relative` of the largest expected value of each array, in stacks of each layer."""
    axes = flatten(declaration.axes)

    def check(path: str, got: np.ndarray, want: np.ndarray) -> None:
        stacked = axes[path][0] == "layers"
        for mine, its in zip(got, want, strict=True) if stacked else [(got, want)]:
            np.testing.assert_allclose(mine, its, rtol=0, atol=relative * np.abs(its).max(), err_msg=path)

    each_leaf(check, got, want)


def equal_sums(got: Loss, want: Loss, relative: float = 1e-5) -> None:
    assert float(got.weight) == float(want.weight) and got.metrics.keys() == want.metrics.keys()
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(mine, its, relative)


def mixed(omni: Omni) -> tuple[Batch, TextBatch]:
    """Four rows of text, pictures, sounds and a video, right-padded."""
    batch = omni.prepare(PROMPTS["unequal rows"][0], padding="right")
    return batch, text_batch(batch, labels_of(batch))


@pytest.fixture(scope="module")
def small(omnis: Callable[[str], Omni]) -> tuple[Omni, Declaration, Batch, TextBatch, Trained]:
    """The mixed rows of "small", their loss and gradient."""
    omni = omnis("small")
    declaration, (batch, rows) = declaration_of(omni), mixed(omni)
    return omni, declaration, batch, rows, trained(declaration, omni.params["thinker"], rows)


@pytest.mark.parametrize(
    "variant, prompt",
    [
        ("tiny", "text"),
        ("small", "unequal rows"),
        pytest.param("odd", "unequal rows", marks=pytest.mark.slow),
        pytest.param("tiny", "mixed", marks=pytest.mark.slow),
        ("odd", "audio in video"),
    ],
)
def test_loss_and_every_gradient_equal_the_reference(
    variant: str, prompt: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    omni, (conversations, hear) = omnis(variant), PROMPTS[prompt]
    batch = omni.prepare(conversations, use_audio_in_video=hear, padding="right")
    labels, declaration = labels_of(batch), declaration_of(omni)
    inputs = reference_inputs(omni.processor, conversations, batch, hear)
    want, auxiliary = reference_loss(reference(variant), inputs, labels)
    loss, gradient = trained(declaration, omni.params["thinker"], text_batch(batch, labels))
    assert loss.weight == (labels[:, 1:] != IGNORED).sum()
    close(loss.total / loss.weight, want)
    close(loss.metrics["auxiliary_loss"] / loss.weight, auxiliary)
    close(loss.metrics["cross_entropy"] / loss.weight, want - COEFFICIENT * auxiliary)
    equal_gradients(declaration, gradient, reference_gradients(reference(variant), "thinker", tmp_path / "gradients"))
    silent = {path.split("/")[0] for path, g in flatten(gradient).items() if not np.any(g)}
    assert silent == ({"vision", "audio"} if prompt == "text" else set()), "every other array is trained"


def test_samples_in_one_row_are_as_in_rows_of_their_own(small: tuple) -> None:
    omni, declaration, batch, rows, (loss, gradient) = small
    lengths = batch.mask.sum(axis=1).tolist()
    packed = pack(rows, lengths, sum(lengths) + 9)
    # What stands in padding does not matter.
    packed = replace(packed, token_ids=np.where(np.arange(sum(lengths) + 9) < sum(lengths), packed.token_ids, 7))
    got, its = trained(declaration, omni.params["thinker"], packed)
    equal_sums(got, loss)
    equal_gradients(declaration, its, gradient)


def test_frozen_encoders_change_nothing_else(small: tuple) -> None:
    omni, declaration, _, rows, (loss, gradient) = small
    params = dict(omni.params["thinker"])
    frozen = {"vision": params.pop("vision"), "audio": {"conv1": params["audio"]["conv1"]}}
    params["audio"] = {name: value for name, value in params["audio"].items() if name != "conv1"}
    got, its = trained(declaration, params, rows, frozen, remat=False)
    equal_sums(got, loss)
    kept = flatten(gradient)
    for path, value in flatten(its).items():
        close(value, kept.pop(path), TOLERANCE)
    assert {path.split("/")[0] for path in kept} == {"vision", "audio"}, "and without remat"


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,expert=2", "tensor=2,expert=2,fsdp=2"])
def test_devices_together_equal_one(mesh: str, omnis: Callable[[str], Omni], one_device: tuple) -> None:
    rows, (loss, gradient) = one_device
    omni, devices = omnis("tiny"), make_mesh(**parse_mesh(mesh))
    declaration = declaration_of(omni, devices)
    over = shardings(declaration.axes, devices)
    params = jax.device_put(omni.params["thinker"], over)
    got, its = trained(declaration, params, rows)
    equal_sums(got, loss)
    equal_gradients(declaration, its, gradient)


@pytest.fixture(scope="module")
def one_device(omnis: Callable[[str], Omni]) -> tuple[TextBatch, Trained]:
    """Eight rows, some with media, and what one device makes of them."""
    omni = omnis("tiny")
    asked = [user(f"{'so ' * n}?") for n in range(6)]
    batch = omni.prepare([user(image_part(60, 90), "What?"), user(audio_part(1.2), "Who?"), *asked], padding="right")
    rows = text_batch(batch, labels_of(batch))
    return rows, trained(declaration_of(omni), omni.params["thinker"], rows)


def test_the_backward_pass_holds_one_layer_at_a_time(omnis: Callable[[str], Omni]) -> None:
    config = omnis("tiny").config.thinker
    declaration = declare(Thinker, replace(config, text=replace(config.text, num_layers=12)))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), declaration.shapes)
    params = {name: shapes.pop(name) for name in ("layers", "norm", "embed", "lm_head")}
    ids = np.zeros((1, 16), np.int32)
    batch = TextBatch(ids, ids, np.zeros((3, 1, 16), np.float32), ids)

    def total(params: dict, frozen: dict, batch: TextBatch) -> jax.Array:
        return thinker_loss(params, frozen, batch, declaration=declaration).total

    memory = jax.jit(jax.grad(total)).lower(params, shapes, batch).compile().memory_analysis()
    trained = sum(p.size * 4 for p in jax.tree.leaves(params))
    assert memory.output_size_in_bytes >= trained > 3 * memory.temp_size_in_bytes


def test_half_precision_is_close(omnis: Callable[[str], Omni], one_device: tuple) -> None:
    rows, (loss, gradient) = one_device
    omni = omnis("tiny")
    got, its = trained(declaration_of(omni), omni.params["thinker"], rows, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((got, its))} == {jnp.dtype("float32")}
    # A bound on what a sane run loses, not a parity tolerance.
    close(got.total, loss.total, 0.05)
    mine, want = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (its, gradient))
    assert mine @ want > 0.9 * np.linalg.norm(mine) * np.linalg.norm(want)


def test_half_precision_multiplies_in_half_precision_on_the_way_back() -> None:
    x, weight = jnp.ones((4, 6), jnp.bfloat16), jnp.ones((5, 6), jnp.bfloat16)
    program = jax.jit(jax.grad(lambda x, w: jnp.sum(project(x, w) ** 2), (0, 1))).lower(x, weight).as_text()
    factors = re.findall(r"dot_general.*: \((.*?)\) ->", program)
    assert len(factors) == 3 and not any("f32" in both for both in factors)


def test_the_auxiliary_loss_is_that_of_the_reference() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

    rng = np.random.default_rng(0)
    layers, tokens, experts, chosen = 3, 20, 7, 2
    logits, counted = rng.standard_normal((layers, tokens, experts), np.float32), rng.random(tokens) < 0.7
    want = load_balancing_loss_func(tuple(map(torch.tensor, logits)), experts, chosen, torch.tensor(counted)[None])
    probability = np.asarray(jax.nn.softmax(logits)) * counted[:, None]
    own = np.argsort(-logits)[..., :chosen, None] == np.arange(experts)
    load = ExpertLoad(jnp.asarray((own.sum(2) * counted[:, None]).sum(1)), jnp.asarray(probability.sum(1)))
    close(load_balancing_loss(load, jnp.asarray(layers * counted.sum())), want)
    even = ExpertLoad(jnp.full((layers, experts), 2.0), jnp.full((layers, experts), 1.0))
    close(load_balancing_loss(even, jnp.asarray(layers * experts)), chosen)


def test_padding_sees_itself_and_is_seen_by_none() -> None:
    first_seen = jnp.array([[0, 0, 2, 2, 4, 5], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 3]])
    want = [[1, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(tokens_of_samples(first_seen), np.array(want, bool))
