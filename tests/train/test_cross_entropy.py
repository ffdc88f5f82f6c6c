"""Cross entropy a few tokens at a time against all logits at once, and what a token is to predict."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.sharding import make_mesh
from omni_jax.train.batch import IGNORED
from omni_jax.train.losses import cross_entropy as module
from omni_jax.train.losses.cross_entropy import cross_entropy, next_labels
from omni_jax.weights.mesh_text import parse_mesh
from tests.helpers.arrays import close

B, T, D, V = 8, 13, 12, 50
LEARNED = 0.6


def case() -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Hidden states, a head, and targets, of which the first tokens of every row have none."""
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, T, D), np.float32), rng.standard_normal((V, D), np.float32)
    targets = np.where(rng.random((B, T)) < LEARNED, rng.integers(0, V, (B, T)), IGNORED)
    targets[:, :4] = IGNORED
    # So that some are the likeliest.
    targets[:, 9] = np.argmax(hidden[:, 9] @ head.T, axis=-1)
    return jnp.asarray(hidden), jnp.asarray(head), targets


def at_once(hidden: jax.Array, head: jax.Array, targets: np.ndarray) -> jax.Array:
    """The sum of cross entropies from all logits."""
    likely = jax.nn.log_softmax(hidden @ head.T)
    own = jnp.take_along_axis(likely, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets == IGNORED, 0, own))


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,expert=2", "tensor=2", "tensor=2,data=2,expert=2", "data=3"])
@pytest.mark.parametrize("logits", [1 << 26, 3 * B * V])
def test_sums_and_gradients_equal_those_of_all_logits(
    logits: int, mesh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", logits)
    hidden, head, targets = case()
    devices = None if mesh is None else make_mesh(**parse_mesh(mesh))

    def scaled(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, object]:
        loss = cross_entropy(hidden, head, targets, devices)
        return 3 * loss.total, loss

    want, gradients = jax.value_and_grad(partial(at_once, targets=targets), (0, 1))(hidden, head)
    (total, loss), got = jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, head)
    close(total, 3 * want)
    for mine, its in zip(got, gradients, strict=True):
        close(mine, 3 * its)
    assert loss.count == (targets != IGNORED).sum()
    assert loss.correct == (np.argmax(hidden @ head.T, axis=-1) == targets).sum() >= B
    close(jax.jit(partial(cross_entropy, mesh=devices))(hidden, head, targets).total, want)


def test_only_a_few_logits_exist_at_once() -> None:
    many, words, width = 4096, 20_000, 16
    hidden, head = jnp.zeros((2, many, width)), jnp.zeros((words, width))
    loss = jax.grad(lambda h, w: cross_entropy(h, w, jnp.zeros((2, many), jnp.int32)).total, (0, 1))
    memory = jax.jit(loss).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert memory < 8 * module.LOGITS < 2 * many * words * 4


def test_nothing_learned_costs_nothing() -> None:
    hidden, head, _ = case()
    none = jnp.full((B, T), IGNORED)
    loss, gradients = jax.value_and_grad(lambda h, w: cross_entropy(h, w, none).total, (0, 1))(hidden, head)
    assert loss == 0 and not any(g.any() for g in gradients)


def test_a_token_predicts_the_next_one_of_its_own_sample() -> None:
    labels = jnp.array([[10, 11, 12, 13, 14, IGNORED, 15, 9]])
    first_seen = jnp.array([[0, 0, 0, 3, 3, 3, 3, 7]])
    want = [[11, 12, IGNORED, 14, IGNORED, 15, IGNORED, IGNORED]]
    np.testing.assert_array_equal(next_labels(labels, first_seen), want)
