"""What checks the GPU runs here on CPU: it passes, and it notices what is wrong."""

import sys
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import sharding
from omni_jax.ops import attention, moe
from scripts.aot import hlo as hlo_report
from scripts.gpu import correct as gpu_correct
from scripts.gpu import correct_speech as gpu_correct_speech
from scripts.gpu import speed as gpu_speed
from tests.helpers.experts import in_int8


@pytest.mark.parametrize(
    "name",
    [
        "check_moe",
        "check_moe_int8",
        "check_attention",
        "check_decode_kernel",
        "check_rope",
        "check_cache",
        "check_top_k",
        "check_thinker",
        "check_talker",
        "check_code2wav",
    ],
)
def test_everything_holds(name: str) -> None:
    findings = getattr(gpu_correct_speech if name in ("check_talker", "check_code2wav") else gpu_correct, name)()
    assert findings and all(finding.ok for finding in findings), findings


@pytest.mark.parametrize(
    "part,wrong",
    [
        ("talker", "layers/shared_expert/gate"),
        ("talker", "hidden_projection/fc1/weight"),
        ("talker", "code_predictor/embed"),
        ("vocoder", "layers/attention_scale"),
        ("vocoder", "decoder/block_1/unit_2/conv1/weight"),
    ],
)
def test_wrong_speech_is_noticed(part: str, wrong: str) -> None:
    params = gpu_correct.random_params(getattr(gpu_correct_speech, f"{part}_declaration")())

    def spoilt(path: Any, leaf: np.ndarray) -> np.ndarray:
        return np.roll(leaf, 1, axis=-1) if "/".join(key.key for key in path) == wrong else leaf

    others = jax.tree_util.tree_map_with_path(spoilt, params)
    findings = getattr(gpu_correct_speech, f"compared_{part}s")(params, others)
    assert not any(finding.ok for finding in findings if "greedy" not in finding.name), findings


@pytest.mark.parametrize("make", [gpu_correct.random_experts, gpu_correct.random_int8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_backend_is_noticed(dtype: str, make: Any) -> None:
    def wrong(x: jax.Array, routing: moe.Routing, experts: moe.ExpertWeights) -> jax.Array:
        return moe.gathered(x, moe.Routing(routing.ids, routing.weights[:, ::-1]), experts)

    assert not gpu_correct.check_backend(wrong, 3, dtype, make).ok


def test_scales_that_are_left_out_are_noticed() -> None:
    def wrong(x: jax.Array, routing: moe.Routing, experts: Any) -> jax.Array:
        return moe.gathered(x, routing, replace(experts, down=replace(experts.down, scale=experts.down.scale[::-1])))

    assert not gpu_correct.check_backend(wrong, 3, "bfloat16", gpu_correct.random_int8).ok


def test_a_backend_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> jax.Array:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(moe, "tiled", fails)
    failed = [finding for finding in gpu_correct.check_moe_int8() if not finding.ok]
    assert len(failed) == 2 and all("no kernel image" in finding.name for finding in failed)


def test_numbers_that_are_not_finite_fail() -> None:
    assert not gpu_correct.compare("", np.asarray([np.nan, 1.0]), np.ones(2), 1.0).ok


def test_another_token_is_forgiven_only_at_a_near_tie() -> None:
    want = np.asarray([[3, 4, 5]])
    logits = np.zeros((1, 3, 8))
    logits[0, [0, 1, 2], want[0]] = [1.0, 1e-3, 1.0]
    sure = gpu_correct.margins(logits)
    assert gpu_correct.same_tokens("", want, want, sure).ok
    assert gpu_correct.same_tokens("", np.asarray([[3, 0, 0]]), want, sure).ok
    assert not gpu_correct.same_tokens("", np.asarray([[0, 4, 5]]), want, sure).ok


def fake_tokamax(calls: list[tuple[int, ...]]) -> ModuleType:
    """tokamax's ragged_dot [R, D] x [E, D, F] -> [R, F] as a masked product."""
    module: Any = ModuleType("tokamax")
    module.__spec__ = ModuleSpec("tokamax", None)

    def ragged_dot(
        lhs: jax.Array, rhs: jax.Array, *, group_sizes: jax.Array, implementation: str, preferred_element_type: Any
    ) -> jax.Array:
        calls.append(rhs.shape)
        expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(lhs.shape[0]), side="right")
        products = jnp.einsum("RD,EDF->REF", lhs, rhs, preferred_element_type=jnp.float32)
        return products[jnp.arange(lhs.shape[0]), expert].astype(preferred_element_type)

    module.ragged_dot = ragged_dot
    return module


@pytest.fixture(params=["9.0", "8.0"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the device, which states what it is capable of, is a Hopper GPU."""
    monkeypatch.setattr(sharding, "first_device", lambda: SimpleNamespace(compute_capability=request.param))
    return request.param == "9.0"


@pytest.mark.parametrize(
    "dtype,F,bound,used", [("bfloat16", 64, 2e-2, True), ("float32", 64, 1e-5, False), ("bfloat16", 48, 2e-2, False)]
)
def test_grouped_calls_tokamax_where_it_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, dtype: str, F: int, bound: float, used: bool
) -> None:
    used = used and hopper
    calls: list[tuple[int, ...]] = []
    monkeypatch.setitem(sys.modules, "tokamax", fake_tokamax(calls))
    rng = np.random.default_rng(0)
    L, E, D, R, A = 2, 5, 64, 9, 3
    gate_up = jnp.asarray(rng.standard_normal((L, E, D, 2, F)) * D**-0.5, dtype)
    down = jnp.asarray(rng.standard_normal((L, E, F, D)) * F**-0.5, dtype)
    x, weights = jnp.asarray(rng.standard_normal((R, D)), dtype), jnp.asarray(rng.random((R, A)), dtype)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(R)]).astype(np.int32)
    got = jax.jit(moe.grouped)(x, moe.Routing(ids, weights), moe.ExpertWeights(gate_up, down, 1))
    exact: Any = [np.asarray(a, np.float64) for a in (x, weights, gate_up[1], down[1])]
    assert gpu_correct.compare("", got, gpu_correct.plain_moe(ids, *exact), bound).ok
    assert calls == ([(E, D, 2 * F), (E, F, D)] if used else [])


def test_experts_in_eight_bits_reach_tokamax_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a QArray, whose values stay int8 and lie as [out, in]."""
    given: list[Any] = []

    class QArray:
        def __init__(self, qvalue: jax.Array, scale: jax.Array, qtype: Any):
            given.append((qvalue, qtype))
            self.wide, self.shape = qvalue.astype(jnp.float32) * scale.astype(jnp.float32), qvalue.shape

    calls: list[tuple[int, ...]] = []
    module, qwix = fake_tokamax(calls), ModuleType("qwix")
    plain_dot = module.ragged_dot
    module.ragged_dot = lambda lhs, rhs, **named: (calls.append(rhs.shape), plain_dot(lhs, rhs.wide, **named))[1]
    qwix.QArray = QArray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setitem(sys.modules, "qwix", qwix)
    rng = np.random.default_rng(0)
    L, E, D, F, R, A = 2, 5, 128, 128, 9, 3
    wide = rng.standard_normal((L, E, D, 2, F), np.float32), rng.standard_normal((L, E, F, D), np.float32)
    gate_up, down, *stands_for = in_int8(*(x * 128**-0.5 for x in wide))
    x, weights = jnp.asarray(rng.standard_normal((R, D)), jnp.bfloat16), jnp.asarray(rng.random((R, A)), jnp.bfloat16)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(R)]).astype(np.int32)
    got = moe.grouped(x, moe.Routing(ids, weights), moe.ExpertWeights(gate_up, down, 1))
    exact: Any = [np.asarray(a, np.float64) for a in (x, weights, *(w[1] for w in stands_for))]
    assert gpu_correct.compare("", got, gpu_correct.plain_moe(ids, *exact), 2e-2).ok
    assert [(values.shape, kind) for values, kind in given] == [((E, D, 2 * F), jnp.int8), ((E, F, D), jnp.int8)]
    assert (E, D, 2 * F) in calls


@pytest.mark.parametrize("dtype, H, used", [("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 48, False)])
def test_sequences_and_pieces_are_attended_by_tokamax_where_it_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, dtype: str, H: int, used: bool
) -> None:
    used = used and hopper
    module, calls = fake_tokamax([]), []

    def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, **named: Any) -> jax.Array:
        calls.append(named)
        return jax.nn.dot_product_attention(q, k, v, **{**named, "implementation": "xla"})

    module.dot_product_attention = dot_product_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    rng, (B, T, K, G) = np.random.default_rng(0), (2, 40, 2, 3)
    q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, T, K, G, H), *[(B, K, T, H)] * 2))
    want = gpu_correct.plain_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), np.zeros(B, np.int32), None)
    assert gpu_correct.compare("", attention.self_attention(q, k, v, forward=True), want, 2e-2).ok
    # A piece of the prompt, after what layer 1 of a cache holds.
    stacks = tuple(jnp.stack([jnp.zeros_like(x), x]) for x in (k, v))
    piece = partial(attention.cached_attention, q[:, 12:32], *stacks, 1, jnp.full(B, 12))
    assert gpu_correct.compare("", piece(alone=True), want[:, 12:32], 2e-2).ok
    assert [named["implementation"] for named in calls] == ["mosaic"] * 2 * used
    # With padding, a window, several devices, or a backward pass to come, blocks attend as ever.
    attention.self_attention(q, k, v, jnp.zeros(B, jnp.int32), forward=True)
    attention.self_attention(q, k, v, window=7, forward=True)
    attention.self_attention(q, k, v)
    piece(first_valid=jnp.zeros(B, jnp.int32), alone=True)
    piece(window=7, alone=True)
    piece()
    assert len(calls) == 2 * used


def test_the_busiest_kernels_of_a_profile() -> None:
    def line(name: str, *events: tuple[str, float]) -> SimpleNamespace:
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=t) for n, t in events])

    stream = line("Stream #1", ("gemm", 3e6), ("copy", 5e6), ("gemm", 4e6))
    device = SimpleNamespace(name="/device:GPU:0", lines=[line("XLA Modules", ("jit", 9e6)), stream])
    assert gpu_speed.busiest([device]) == [("gemm", 7.0, 2), ("copy", 5.0, 1)]


HLO = """HloModule m, num_partitions=4
%fused_slice (p: f32[4,8,16], i: s32[]) -> f32[1,8,16] {
  %p = f32[4,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %slice = f32[1,8,16]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,16}
}

%body (t: (s32[], f32[4,8,16])) -> (s32[], f32[4,8,16]) {
  %t = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[4,8,16]{2,1,0} get-tuple-element(%t), index=1
  %one = f32[1,8,16]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %sum = f32[8,16]{1,0} all-reduce(%one), to_apply=%add
  %next = s32[] add(%i, %i)
  ROOT %out = (s32[], f32[4,8,16]{2,1,0}) tuple(%next, %w)
}

ENTRY %main (w: f32[4,8,16]) -> f32[4,8,16] {
  %w = f32[4,8,16]{2,1,0} parameter(0)
  %c = f32[4,8,16]{2,1,0} copy(%w)
  %begun = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%c), dimensions={0}
  %ended = f32[4,8]{1,0} all-gather-done(%begun)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4,8,16]{2,1,0}) tuple(%zero, %c)
  %loop = (s32[], f32[4,8,16]{2,1,0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %r = f32[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_launches_and_copies_are_read_from_a_program() -> None:
    module = hlo_report.Module(HLO)
    assert module.kernels() == 5
    assert module.launches() == 2 + 4 * 3
    assert module.collectives() == {"all-reduce": (4, 2 * 3 * 4 * 8 * 16), "all-gather": (1, 3 * 4 * 8)}
    assert module.largest() == (4 * 8 * 16 * 4, "copy f32[4,8,16]")
    assert module.copies({8 * 16 * 4: "layer", 4 * 8 * 16 * 4: "all"}) == {"layer": 1, "all": 1}
