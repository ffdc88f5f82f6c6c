"""Low-rank updates of experts: every backend and mesh computes what merged weights give, and trains factors alone."""

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.ops import moe
from omni_jax.ops.expert_parallel import exchanged, replicated, sharded_moe
from omni_jax.ops.low_rank import Factors, GatedFactors
from omni_jax.ops.moe import ExpertWeights, Routing
from omni_jax.sharding import make_mesh, split_over
from tests.helpers.experts import plain

L, E, D, F, A, RANK, SCALE = 2, 8, 12, 10, 3, 4, 1.5
BACKENDS = {"pairwise": moe.pairwise, "tiled": moe.tiled, "gathered": moe.gathered, "grouped": moe.grouped}


def experts(dtype: Any = np.float32, D: int = D, F: int = F) -> ExpertWeights:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5, dtype)

    def factors(inner: int, outer: int) -> Factors:
        return Factors(normal(L, E, RANK, inner), normal(L, E, outer, RANK), SCALE)

    lora = GatedFactors(factors(D, F), factors(D, F), factors(F, D))
    return ExpertWeights(normal(L, E, D, 2, F), normal(L, E, F, D), jnp.int32(1), lora)


def merged(given: ExpertWeights) -> tuple[np.ndarray, np.ndarray]:
    """gate_up and down, float64, with their updates added."""
    assert given.lora is not None

    def update(factors: Factors) -> np.ndarray:
        a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
        return SCALE * np.einsum("...or,...ri->...io", b, a)

    gate_up = np.asarray(given.gate_up, np.float64) + np.stack([update(given.lora.gate), update(given.lora.up)], 3)
    return gate_up, np.asarray(given.down, np.float64) + update(given.lora.down)


def routing(rows: int, seed: int = 0) -> tuple[jax.Array, Routing]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    scale = rng.random((rows, A), np.float32)
    return jnp.asarray(rng.standard_normal((rows, D), np.float32)), Routing(jnp.asarray(ids), jnp.asarray(scale))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_merged_weights(backend: str, rows: int) -> None:
    x, chosen = routing(rows)
    given = experts()
    want = plain(np.asarray(x), np.asarray(chosen.ids), np.asarray(chosen.weights), *merged(given), 1)
    got = jax.jit(BACKENDS[backend])(x, chosen, given)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_the_grouped_kernel_takes_padded_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def ragged_dot(rows: jax.Array, weights: jax.Array, *, group_sizes: jax.Array, **_: Any) -> jax.Array:
        seen.append(weights.shape[1:])
        group = jnp.repeat(jnp.arange(E), group_sizes, total_repeat_length=len(rows))
        return jnp.einsum("ri,rio->ro", rows, weights[group], preferred_element_type=jnp.float32).astype(rows.dtype)

    monkeypatch.setitem(sys.modules, "tokamax", ModuleType("tokamax"))
    monkeypatch.setattr(sys.modules["tokamax"], "ragged_dot", ragged_dot, raising=False)
    monkeypatch.setattr(moe, "find_spec", lambda name: SimpleNamespace(name=name))
    given, (_, chosen) = experts(jnp.bfloat16, 64, 128), routing(20)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((20, 64)), jnp.bfloat16)
    want = plain(np.asarray(x, np.float32), np.asarray(chosen.ids), np.asarray(chosen.weights), *merged(given), 1)
    got = np.asarray(moe.grouped(x, chosen, given))
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
    assert len(seen) == 8 and all(inner % 64 == outer % 64 == 0 for inner, outer in seen)


def factor_gradients(given: ExpertWeights, run: Any, x: jax.Array, chosen: Routing) -> tuple:
    def loss(lora: GatedFactors, x: jax.Array, weights: jax.Array) -> jax.Array:
        one = ExpertWeights(given.gate_up, given.down, given.layer, lora)
        return jnp.sum(run(x, Routing(chosen.ids, weights), one) ** 2)

    assert given.lora is not None
    return jax.jit(jax.grad(loss, (0, 1, 2)))(given.lora, x, chosen.weights)


def close(got: Any, want: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def dense(x: jax.Array, chosen: Routing, given: ExpertWeights) -> jax.Array:
    """By the products of all experts, for gradients by JAX alone."""
    assert given.lora is not None

    def update(factors: Factors) -> jax.Array:
        return SCALE * jnp.einsum("eor,eri->eio", factors.b[1], factors.a[1])

    gate_up, down = given.gate_up[1], given.down[1] + update(given.lora.down)
    gate, up = gate_up[:, :, 0] + update(given.lora.gate), gate_up[:, :, 1] + update(given.lora.up)
    hidden = jax.nn.silu(jnp.einsum("RD,EDF->REF", x, gate)) * jnp.einsum("RD,EDF->REF", x, up)
    out = jnp.einsum("REF,EFD->RED", hidden, down)
    return jnp.einsum("RAD,RA->RD", out[jnp.arange(len(x))[:, None], chosen.ids], chosen.weights)


@pytest.mark.parametrize("backend", ["pairwise", "tiled"])
def test_gradients_of_factors_equal_the_dense_form(backend: str) -> None:
    given, (x, chosen) = experts(), routing(30)
    close(factor_gradients(given, BACKENDS[backend], x, chosen), factor_gradients(given, dense, x, chosen))


def test_no_gradient_of_weights_is_computed_beside_factors() -> None:
    wide = 128
    given, (_, chosen) = experts(D=wide, F=wide), routing(64)
    x = jnp.ones((64, wide))

    def loss(lora: GatedFactors, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.sum(moe.tiled(x, chosen, ExpertWeights(gate_up, down, 1, lora)) ** 2)

    def written(arguments: tuple[int, ...]) -> int:
        """How often the compiled gradient writes into an array of all experts' weights."""
        compiled = jax.jit(jax.grad(loss, arguments)).lower(given.lora, given.gate_up, given.down).compile()
        writes = rf"= f32\[{L * E},{wide},({wide}|{2 * wide})\]\S* (dynamic-update-slice|scatter|fusion)\("
        return len(re.findall(writes, compiled.as_text()))

    assert written((0, 1, 2)) > 0 == written((0,))


@pytest.mark.parametrize(
    "sizes, form",
    [
        ({"expert": 4, "data": 2}, "replicated"),
        ({"expert": 4, "tensor": 2}, "exchanged"),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, "any"),
    ],
)
def test_meshes_equal_one_device(sizes: dict[str, int], form: str) -> None:
    mesh, given, (x, chosen) = make_mesh(**sizes), experts(), routing(32)
    split = split_over("batch", 32, mesh)

    def run(x: jax.Array, chosen: Routing, given: ExpertWeights) -> jax.Array:
        forms = {"replicated": replicated, "exchanged": exchanged, "any": sharded_moe}
        return forms[form](x, chosen, given, mesh, split)

    want = plain(np.asarray(x), np.asarray(chosen.ids), np.asarray(chosen.weights), *merged(given), 1)
    np.testing.assert_allclose(jax.jit(run)(x, chosen, given), want, atol=1e-5 * np.abs(want).max())
    close(factor_gradients(given, run, x, chosen), factor_gradients(given, dense, x, chosen))
