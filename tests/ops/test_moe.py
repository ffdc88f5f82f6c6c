"""Every MoE backend computes the same sum as a plain loop over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.ops import moe
from omni_jax.ops.int8 import Int8
from omni_jax.ops.moe import ExpertWeights, Routing
from tests.helpers.experts import in_int8, plain

# Without tokamax `grouped` takes the tiles; with it, on a GPU, scripts/gpu holds it to the same sum.
BACKENDS = {"pairwise": moe.pairwise, "tiled": moe.tiled, "gathered": moe.gathered, "grouped": moe.grouped}


def weights(L: int, E: int, D: int, F: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((L, E, D, 2, F), np.float32) * D**-0.5
    return gate_up, rng.standard_normal((L, E, F, D), np.float32) * F**-0.5


@pytest.mark.parametrize("rows", [1, 5, 128, 129])
def test_pairs_are_ordered_by_expert_whether_compared_or_sorted(rows: int) -> None:
    ids = np.random.default_rng(rows).integers(0, 5, (rows, 8)).astype(np.int32)
    order, place = map(np.asarray, moe._order_by_expert(jnp.asarray(ids)))
    np.testing.assert_array_equal(order, np.argsort(ids.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(order[place.reshape(-1)], np.arange(ids.size))
    assert place.shape == ids.shape


@pytest.mark.parametrize("rows", [1, 3, 8, 33, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_a_plain_loop(backend: str, rows: int) -> None:
    L, E, D, F, A = 2, 7, 12, 10, 3
    rng = np.random.default_rng(rows)
    gate_up, down = weights(L, E, D, F)
    x = rng.standard_normal((rows, D), np.float32)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    scale = rng.random((rows, A), np.float32)
    got = jax.jit(BACKENDS[backend])(x, Routing(ids, scale), ExpertWeights(gate_up, down, jnp.int32(1)))
    want = plain(x, ids, scale, gate_up, down, 1)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_in_eight_bits_are_those_that_they_stand_for(backend: str, rows: int) -> None:
    L, E, D, F, A = 2, 7, 12, 10, 3
    rng = np.random.default_rng(rows)
    gate_up, down, wide_gate_up, wide_down = in_int8(*weights(L, E, D, F))
    x = rng.standard_normal((rows, D), np.float32)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    scale = rng.random((rows, A), np.float32)
    got = jax.jit(BACKENDS[backend])(x, Routing(ids, scale), ExpertWeights(gate_up, down, jnp.int32(1)))
    want = plain(x, ids, scale, wide_gate_up, wide_down, 1)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_few_rows_on_cpu_widen_one_expert_at_a_time() -> None:
    """The whole stack as float32, which the compiler could make of it once and for all, would lose what int8 saves."""
    L, E, D, F = 2, 16, 256, 128
    int8 = Int8(jax.ShapeDtypeStruct((L, E, 2, F, D), jnp.int8), jax.ShapeDtypeStruct((L, E, 2, F), jnp.float32))
    down = Int8(jax.ShapeDtypeStruct((L, E, D, F), jnp.int8), jax.ShapeDtypeStruct((L, E, D), jnp.float32))
    row, ids = jax.ShapeDtypeStruct((1, D), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    routing = Routing(ids, jax.ShapeDtypeStruct((1, 4), jnp.float32))

    def layers(x: jax.Array, routing: Routing, gate_up: Int8, down: Int8) -> jax.Array:
        return jax.lax.fori_loop(0, L, lambda l, x: moe.moe(x, routing, ExpertWeights(gate_up, down, l)), x)

    memory = jax.jit(layers).lower(row, routing, int8, down).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 3 * D * F * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_to_one_expert(backend: str) -> None:
    gate_up, down = weights(1, 5, 6, 4)
    x = np.random.default_rng(1).standard_normal((70, 6), np.float32)
    ids = jnp.full((70, 1), 4)
    scale = jnp.ones((70, 1))
    got = BACKENDS[backend](jnp.asarray(x), Routing(ids, scale), ExpertWeights(gate_up, down, 0))
    np.testing.assert_allclose(got, plain(x, ids, scale, gate_up, down, 0), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_experts_are_not_computed(backend: str) -> None:
    gate_up, down = weights(2, 6, 8, 4)
    for array in (gate_up, down):
        array[0] = array[1, [0, 2, 4, 5]] = np.nan
    x = jnp.asarray(np.random.default_rng(4).standard_normal((40, 8), np.float32))
    ids = jnp.tile(jnp.array([[1, 3]]), (40, 1))
    experts = ExpertWeights(gate_up, down, 1)
    assert np.all(np.isfinite(BACKENDS[backend](x, Routing(ids, jnp.ones((40, 2))), experts)))


@pytest.mark.parametrize("most", [5, 16, 17, 63, 64, 65, 130])
def test_tiles_of_every_size(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    E, A, R = 6, 2, 130
    gate_up, down = weights(1, E, 12, 10)
    rng = np.random.default_rng(most)
    x, scale = rng.standard_normal((R, 12), np.float32), rng.random((R, A), np.float32)
    # Expert 3 gets `most` rows, expert 5 none, and of the others each row gets two or one.
    ids = np.stack([rng.permutation([0, 1, 2, 4])[:A] for _ in range(R)]).astype(np.int32)
    ids[rng.permutation(R)[:most], 1] = 3
    monkeypatch.setattr(moe, "STEP_ROWS", (8, 8))
    got = jax.jit(moe.tiled)(x, Routing(ids, scale), ExpertWeights(gate_up, down, 0))
    want = plain(x, ids, scale, gate_up, down, 0)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_gradients_keep_no_weights_of_each_tile() -> None:
    L, E, A, D, F, R = 2, 8, 2, 64, 64, 256
    shapes = ((R, D), (R, A), (L, E, D, 2, F), (L, E, F, D))
    x, scale, gate_up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids = jax.ShapeDtypeStruct((R, A), jnp.int32)

    def loss(x: jax.Array, gate_up: jax.Array, down: jax.Array, ids: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(moe.tiled(x, Routing(ids, scale), ExpertWeights(gate_up, down, 1)) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, gate_up, down, ids, scale).compile()
    # One expert's weights in every tile and size would be several times all experts of one layer.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * L * E * D * 3 * F + 4 * 8 * R * A * D


@pytest.mark.parametrize("rows", [2, 20, 90])
def test_gradients_equal_the_dense_form(rows: int) -> None:
    gate_up, down = weights(1, 4, 6, 5)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 6), np.float32)
    ids = jnp.stack([rng.permutation(4)[:2] for _ in range(rows)])
    # Expert 0 takes every row, so that with many it has several tiles.
    ids = jnp.where(jnp.any(ids == 0, axis=1, keepdims=True), ids, ids.at[:, 0].set(0))
    scale = jnp.asarray(rng.random((rows, 2), np.float32))

    def dense(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        hidden = jnp.einsum("RD,EDCF->RECF", x, gate_up[0])
        out = jnp.einsum("REF,EFD->RED", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], down[0])
        return jnp.sum(jnp.einsum("RAD,RA->RD", out[jnp.arange(rows)[:, None], ids], scale) ** 2)

    def routed(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.sum(moe.moe(x, Routing(ids, scale), ExpertWeights(gate_up, down, 0)) ** 2)

    for got, want in zip(
        jax.grad(routed, (0, 1, 2))(x, gate_up, down), jax.grad(dense, (0, 1, 2))(x, gate_up, down), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_routing_normalises_only_when_told() -> None:
    rng = np.random.default_rng(3)
    x, router = rng.standard_normal((5, 6), np.float32), rng.standard_normal((9, 6), np.float32)
    chosen, same = (moe.route(x, router, 3, normalise) for normalise in (False, True))
    raw, normalised = chosen.weights, same.weights
    probabilities = jax.nn.softmax(x @ router.T, axis=-1)
    np.testing.assert_array_equal(chosen.ids, same.ids)
    np.testing.assert_allclose(raw, np.sort(probabilities, axis=-1)[:, ::-1][:, :3], rtol=1e-5)
    np.testing.assert_allclose(normalised, raw / raw.sum(-1, keepdims=True), rtol=1e-6)


def test_routing_is_decided_in_float32_whatever_the_type_of_the_rows() -> None:
    """Logits of 0.25 + k / 512 differ in bfloat16; their softmax, rounded to it, would tie."""
    E = 64
    router = jnp.asarray(0.25 + np.arange(E) / 512, jnp.bfloat16)[:, None]
    assert len(np.unique(np.asarray(router, np.float32))) == E
    got = moe.route(jnp.ones((1, 1), jnp.bfloat16), router, E, False)
    assert got.ids[0].tolist() == list(range(E))[::-1] and got.weights.dtype == jnp.bfloat16
