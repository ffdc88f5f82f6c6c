"""Experts on several devices give what they give on one, whichever way rows and experts come together."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omni_jax.config import OmniConfig
from omni_jax.models.feed_forward import Experts
from omni_jax.models.low_rank import LowRankConfig
from omni_jax.models.param import declare
from omni_jax.ops import expert_parallel
from omni_jax.ops.expert_parallel import exchanged, own_ids, replicated, sharded_moe, stored_axes
from omni_jax.ops.low_rank import Factors, GatedFactors
from omni_jax.ops.moe import ExpertWeights, Routing, gathered, grouped, moe, partial_moe
from omni_jax.sharding import make_mesh, split_over
from omni_jax.weights.mesh_text import parse_mesh
from scripts.small.configs import config_dict
from tests.helpers.arrays import close
from tests.helpers.experts import collectives, in_int8, plain

L, E, D, F, A = 2, 8, 12, 10, 3
LINEAR = ("gate", "up", "down")
FORMS = {"replicated": replicated, "exchanged": exchanged}
Arrays = tuple[jax.Array, ...]


def case(rows: int, routing: str = "random") -> Arrays:
    """Rows, experts, their weights, and the experts' own; routing "one shard": all rows to the last three experts."""
    rng = np.random.default_rng(rows)
    gate_up = rng.standard_normal((L, E, D, 2, F), np.float32) * D**-0.5
    down = rng.standard_normal((L, E, F, D), np.float32) * F**-0.5
    x, scale = rng.standard_normal((rows, D), np.float32), rng.random((rows, A), np.float32)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(rows)]).astype(np.int32)
    if routing == "one shard":
        ids = np.tile(np.arange(E - A, E, dtype=np.int32), (rows, 1))
    return tuple(map(jnp.asarray, (x, ids, scale, gate_up, down)))


def given(x: jax.Array, ids: jax.Array, scale: jax.Array, gate_up: Any, down: Any, l: int) -> tuple:
    """The arguments of every form."""
    return x, Routing(ids, scale), ExpertWeights(gate_up, down, l)


def mesh_of(text: str) -> Mesh:
    return make_mesh(**parse_mesh(text))


def one_by_one(*arrays: jax.Array) -> np.ndarray:
    """The sum of layer 1 by a plain loop over rows."""
    return plain(*map(np.asarray, arrays), 1)


ALL = ("data", "fsdp", "expert")


@pytest.mark.parametrize(
    "mesh, form, rows, split",
    [
        ("expert=2", "replicated", 8, ()),
        ("expert=8", "replicated", 8, ALL),
        ("expert=8", "exchanged", 64, ALL),
        ("expert=4,data=2", "replicated", 64, ("data",)),
        ("expert=4,data=2", "exchanged", 64, ALL),
        ("expert=2,tensor=2,data=2", "replicated", 64, ALL),
        ("expert=2,tensor=2,data=2", "replicated", 8, ("data",)),
        ("expert=2,tensor=2,data=2", "exchanged", 16, ALL),
    ],
)
def test_forms_equal_one_device(mesh: str, form: str, rows: int, split: tuple[str, ...]) -> None:
    many = jax.jit(partial(FORMS[form], mesh=mesh_of(mesh), split=split))
    for routing in ("random", "one shard"):
        arrays = case(rows, routing)
        close(many(*given(*arrays, 1)), one_by_one(*arrays))


@pytest.mark.parametrize("mesh", ["data=8", "tensor=2", "fsdp=2,expert=2,tensor=2"])
def test_other_axes_alone(mesh: str) -> None:
    over, arrays = mesh_of(mesh), case(24)
    split = split_over("batch", 24, over)
    close(jax.jit(partial(sharded_moe, mesh=over, split=split))(*given(*arrays, 1)), one_by_one(*arrays))


@pytest.mark.parametrize("mesh, form", [("expert=2,tensor=2,data=2", "exchanged"), ("fsdp=2,expert=4", "replicated")])
def test_experts_in_eight_bits(mesh: str, form: str) -> None:
    x, ids, scale, *wide = case(16)
    gate_up, down, wide_gate_up, wide_down = in_int8(*map(np.asarray, wide))
    many = jax.jit(partial(FORMS[form], mesh=mesh_of(mesh), split=ALL))
    close(many(*given(x, ids, scale, gate_up, down, 1)), one_by_one(x, ids, scale, wide_gate_up, wide_down))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_one_device(form: str) -> None:
    over, (x, ids, scale, gate_up, down) = mesh_of("expert=2,tensor=2,data=2"), case(16)

    def loss(sum_of: Any, x: jax.Array, scale: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.sum(sum_of(*given(x, ids, scale, gate_up, down, 1)) ** 2)

    many = partial(loss, partial(FORMS[form], mesh=over, split=ALL))
    got = jax.jit(jax.grad(many, (0, 1, 2, 3)))(x, scale, gate_up, down)
    for mine, its in zip(
        got, jax.jit(jax.grad(partial(loss, moe), (0, 1, 2, 3)))(x, scale, gate_up, down), strict=True
    ):
        np.testing.assert_allclose(mine, its, atol=1e-4 * np.abs(its).max())


def test_gradients_of_few_rows() -> None:
    over, (x, ids, scale, gate_up, down) = mesh_of("expert=4"), case(4)
    grads = [
        jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(f(*given(x, ids, scale, w, down, 0)) ** 2), (0, 1)))(x, gate_up)
        for f in (partial(replicated, mesh=over, split=()), moe)
    ]
    for mine, its in zip(*grads, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4 * np.abs(its).max())


@pytest.mark.parametrize("form, rows", [("replicated", 4), ("exchanged", 40)])
def test_a_device_uses_no_experts_but_those_that_are_chosen(form: str, rows: int) -> None:
    x, _, scale, gate_up, down = case(rows)
    gate_up, down = (w.at[0].set(jnp.nan).at[1, jnp.array([0, 2, 4, 5])].set(jnp.nan) for w in (gate_up, down))
    ids = jnp.tile(jnp.array([[1, 3, 7]]), (rows, 1))
    many = jax.jit(partial(FORMS[form], mesh=mesh_of("expert=4"), split=ALL))
    assert np.isfinite(many(*given(x, ids, scale, gate_up, down, 1))).all()


@pytest.mark.parametrize("backend, rows", [(gathered, 3), (grouped, 40), (partial_moe, 3)])
def test_shares_of_the_experts_add_up(backend: Any, rows: int) -> None:
    arrays = case(rows)
    x, ids, scale, gate_up, down = arrays

    @jax.jit
    def share(s: jax.Array) -> jax.Array:
        own = (jax.lax.dynamic_slice_in_dim(w, 2 * s, 2, axis=1) for w in (gate_up, down))
        return backend(*given(x, own_ids(ids, s, 2), scale, *own, 1), E)

    close(sum(share(s) for s in range(E // 2)), one_by_one(*arrays))


def ragged(
    operand: jax.Array, output: jax.Array, start: Any, sent: Any, landing: Any, received: Any, *, axis_name: str
) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` does, from its documentation, with collectives that CPU has."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, counts, landings = (jax.lax.all_gather(a, axis_name) for a in (operand, start, sent, landing))
    for source in range(len(sent)):
        count, at = counts[source, me], landings[source, me]
        # Every sender's count must be what the receiver was told to expect.
        output = jnp.where(count == received[source], output, jnp.nan)
        row = jnp.arange(output.shape[0]) - at
        taken = operands[source][jnp.clip(starts[source, me] + row, 0, operand.shape[0] - 1)]
        output = jnp.where(((row >= 0) & (row < count))[:, None], taken, output)
    return output


def test_ragged_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    many = jax.jit(partial(exchanged, mesh=mesh_of("expert=4,data=2"), split=ALL))
    for routing in ("random", "one shard"):
        arrays = case(48, routing)
        close(many(*given(*arrays, 1)), one_by_one(*arrays))


@pytest.mark.parametrize("form", FORMS)
def test_rows_move_and_weights_stay(form: str) -> None:
    over, rows, wide = mesh_of("expert=4,tensor=2"), 16, 64
    split = ALL if form == "exchanged" else ()
    shapes = ((rows, D), (rows, A), (rows, A), (L, E, D, 2, wide), (L, E, wide, D))
    where = (P(split or None),) * 3 + (P(None, "expert", None, None, "tensor"), P(None, "expert", "tensor"))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if i == 1 else jnp.float32, sharding=NamedSharding(over, part))
        for i, (shape, part) in enumerate(zip(shapes, where, strict=True))
    ]
    found = collectives(jax.jit(partial(FORMS[form], mesh=over, split=split)).lower(*given(*arrays, 1)).compile())
    assert "all-reduce" in found and ("all-to-all" in found) == (form == "exchanged")
    one_expert = D * wide
    assert max(found.values()) <= 4 * rows * D <= one_expert


def test_layers_are_split_as_their_stacks_are_declared() -> None:
    text = OmniConfig.from_hf(config_dict("tiny")).thinker.text
    axes: Any = declare(Experts, text, 2, LowRankConfig(("experts",), 4, 1.0)).axes
    lora = GatedFactors(*(Factors(axes["lora"][name]["a"], axes["lora"][name]["b"], 1.0) for name in LINEAR))
    declared = ExpertWeights(axes["gate_up"], axes["down"], None, lora)  # pyright: ignore
    assert stored_axes(declared) == declared


def test_the_form_follows_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in FORMS:
        monkeypatch.setattr(expert_parallel, name, lambda x, *_, name=name: taken.append(name))
    monkeypatch.setattr(expert_parallel, "EXCHANGE_ROWS", 4)
    many, few = case(64), case(32)
    over = mesh_of("expert=8")
    sharded_moe(*given(*many, 0), over, ALL)
    sharded_moe(*given(*few, 0), over, ALL)
    sharded_moe(*given(*many, 0), over, ())
    sharded_moe(*given(*many, 0), mesh_of("expert=2"), ALL)
    assert taken == ["exchanged", "replicated", "replicated", "replicated"]
