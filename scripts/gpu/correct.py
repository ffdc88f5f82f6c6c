"""Does the device compute what NumPy and the CPU compute? Small enough to run on CPU too.

Every function returns findings: what was compared, the largest error relative to the largest value expected, and the
bound it must keep. float32 runs at the highest matrix precision, so that its bounds are those of rounding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import CHUNK, PrefillInput, decode_chunk, prefill
from omni_jax.decoder_config import RopeConfig
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.models.thinker import Thinker
from omni_jax.ops import decode_kernel, moe
from omni_jax.ops.attention import cached_attention, causal_attention, fits_kernel, self_attention
from omni_jax.ops.cache import KVCache
from omni_jax.ops.int8 import Int8
from omni_jax.ops.rope import rope, rotate
from omni_jax.ops.top_k import BLOCK, by_blocks
from omni_jax.weights.int8 import rounded
from scripts.small.configs import config_dict

FLOAT32, BFLOAT16 = 1e-5, 2e-2
# Whole model: the logits' root mean square error in bfloat16 over their own, routing flips included.
LOGITS_FLOAT32, LOGITS_BFLOAT16 = 1e-4, 1e-1
# The reference's two best tokens are this close where another token may be drawn.
MARGIN = 2e-3


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def precision(dtype: str) -> Any:
    """The context in which products of `dtype` are computed: float32 never in fewer bits."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def compare(name: str, got: Any, want: Any, bound: float) -> Finding:
    """The largest difference relative to the largest expected value; infinite where something is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    return Finding(name, float(error) if np.isfinite(error) else float("inf"), bound)


def root_mean_square(name: str, got: Any, want: Any, bound: float) -> Finding:
    """The root mean square difference relative to that of `want`; infinite where something is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    return Finding(name, float(error) if np.isfinite(error) else float("inf"), bound)


def on_cpu(function: Any, *args: Any) -> np.ndarray:
    """The result of the function of arrays [...] on the first CPU device, in NumPy."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return np.asarray(jax.jit(function)(*jax.device_put(args, cpu)))


def tried(name: str, bound: float, run: Callable[[], list[Finding]]) -> list[Finding]:
    """What `run` finds; what it fails with is no number: an infinite error."""
    try:
        return run()
    except Exception as error:
        return [Finding(f"{name}: {type(error).__name__}: {str(error)[:200]}", float("inf"), bound)]


def check_moe() -> list[Finding]:
    """Every backend in both types."""
    return [found for dtype in ("float32", "bfloat16") for found in check_backends(dtype, random_experts)]


def check_moe_int8() -> list[Finding]:
    """Every backend with experts in eight bits, rows in both types."""
    return [found for dtype in ("float32", "bfloat16") for found in check_backends(dtype, random_int8)]


def check_backends(dtype: str, make: Callable[..., Any]) -> list[Finding]:
    """Every backend that can run here, with the experts that `make` makes."""
    cases: list[tuple[Any, int]] = [(moe.gathered, 1), (moe.gathered, 3), (moe.tiled, 40), (moe.tiled, 300)]
    if jax.default_backend() == "cpu":
        cases = [*cases[1:3], (moe.pairwise, 5)]
    elif find_spec("tokamax") and dtype == "bfloat16":
        cases += [(moe.grouped, R) for R in (1, 4, 5, 16, 300)]
    bound = FLOAT32 if dtype == "float32" else BFLOAT16
    return [
        found
        for backend, R in cases
        for found in tried(
            f"moe {backend.__name__}, {R} rows, {dtype}, {make.__name__}",
            bound,
            lambda backend=backend, R=R: [check_backend(backend, R, dtype, make)],
        )
    ]


def random_experts(rng: np.random.Generator, dtype: str) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Experts gate_up [L, E, D, 2, F] and down [L, E, F, D], and what they stand for, float64."""
    L, E, D, F = 2, 8, 128, 64
    gate_up = jnp.asarray(rng.standard_normal((L, E, D, 2, F)) * D**-0.5, dtype)
    down = jnp.asarray(rng.standard_normal((L, E, F, D)) * F**-0.5, dtype)
    return gate_up, down, np.asarray(gate_up, np.float64), np.asarray(down, np.float64)


def random_int8(rng: np.random.Generator, dtype: str) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Experts `Int8` gate_up [L, E, 2, F, D] and down [L, E, D, F], and what they stand for as there, float64.

    Their widths are those that the grouped kernel takes.
    """
    L, E, D, F = 2, 8, 256, 128

    def one(*shape: int) -> tuple[Int8, np.ndarray]:
        """An `Int8` of this shape [..., out, in], and its values times their scales."""
        own = in_int8(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5, dtype)
        return own, np.asarray(own.values) * np.asarray(own.scale, np.float64)[..., None]

    (gate_up, wide_gate_up), (down, wide_down) = one(L, E, 2, F, D), one(L, E, D, F)
    return gate_up, down, np.moveaxis(wide_gate_up, -1, 2), wide_down.swapaxes(2, 3)


def in_int8(weight: np.ndarray, dtype: str) -> Int8:
    """A weight [..., out, in] in eight bits, with scales in `dtype`."""
    values, scale = rounded(weight.reshape(-1, weight.shape[-1]), np.dtype(jnp.dtype(dtype)))
    return Int8(jnp.asarray(values.reshape(weight.shape)), jnp.asarray(scale.reshape(weight.shape[:-1])))


def check_backend(backend: Any, R: int, dtype: str, make: Callable[..., Any] = random_experts) -> Finding:
    """One backend on R rows against float64 NumPy on the same (rounded) values."""
    rng, A = np.random.default_rng(R), 3
    gate_up, down, wide_gate_up, wide_down = make(rng, dtype)
    E, D = wide_gate_up.shape[1:3]
    x, weights = jnp.asarray(rng.standard_normal((R, D)), dtype), jnp.asarray(rng.random((R, A)), dtype)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(R)]).astype(np.int32)
    with precision(dtype):
        got = jax.jit(backend)(
            x, moe.Routing(jnp.asarray(ids), weights), moe.ExpertWeights(gate_up, down, jnp.int32(1))
        )
    rows, counted = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    bound = FLOAT32 if dtype == "float32" else BFLOAT16
    name = f"moe {backend.__name__}, {R} rows, {dtype}{', int8' if isinstance(down, Int8) else ''}"
    return compare(name, got, plain_moe(ids, rows, counted, wide_gate_up[1], wide_down[1]), bound)


def plain_moe(ids: np.ndarray, x: np.ndarray, weights: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The weighted sum over each row's experts as two loops, float64 [R, D].

    ids int and weights [R, A], x [R, D], gate_up [E, D, 2, F], down [E, F, D].
    """
    out = np.zeros_like(x)
    for r, row in enumerate(x):
        for e, weight in zip(ids[r], weights[r], strict=True):
            gate, up = row @ gate_up[e, :, 0], row @ gate_up[e, :, 1]
            out[r] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


def check_attention() -> list[Finding]:
    """Whole sequences, one query and a block of queries against a cache, with and without a window."""
    rng = np.random.default_rng(1)
    B, K, G, H, S = 3, 2, 4, 64, 300
    keys, values = (rng.standard_normal((B, K, S, H), np.float32) for _ in range(2))
    findings = []
    for T, window in ((S, None), (S, 70), (1, None), (8, None), (8, 70)):
        q = rng.standard_normal((B, T, K, G, H), np.float32)
        offset = np.asarray([S - T, 100, 0], np.int32) if T < S else np.zeros(B, np.int32)
        with precision("float32"):
            if T == S:
                got = jax.jit(partial(self_attention, window=window))(q, keys, values)
            else:
                got = jax.jit(partial(causal_attention, window=window))(q, keys, values, offset)
        want = plain_attention(q, keys, values, offset, window)
        findings.append(compare(f"attention, {T} queries, window {window}", got, want, FLOAT32))
    return [
        *findings,
        *(check_kernel(T) for T in (300, 1024)),
        *(check_piece(dtype) for dtype in ("float32", "bfloat16")),
    ]


def check_kernel(T: int) -> Finding:
    """Whole sequences of T tokens in bfloat16, by the fused kernel where there is one."""
    rng, (B, K, G, H) = np.random.default_rng(T), (2, 4, 8, 128)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((B, T, K, G, H), *[(B, K, T, H)] * 2)
    )
    got = jax.jit(partial(self_attention, forward=True))(q, k, v)
    queries, keys, values = (np.asarray(x, np.float32) for x in (q, k, v))
    want = plain_attention(queries, keys, values, np.zeros(B, np.int32), None)
    return compare(
        f"attention, {T} queries in bfloat16, {'a kernel' if fits_kernel(q) else 'blocks'}", got, want, BFLOAT16
    )


def check_piece(dtype: str) -> Finding:
    """A piece of 512 tokens after what layer 1 of a cache holds: bfloat16 by the fused kernel where there is one."""
    rng, (L, B, K, G, H, T, S) = np.random.default_rng(9), (2, 2, 4, 8, 128, 512, 2048)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, T, K, G, H), *[(L, B, K, S, H)] * 2))
    offset = np.asarray([S - T, 300], np.int32)
    with precision("float32"):
        got = jax.jit(partial(cached_attention, alone=True))(q, k, v, 1, offset)
    queries, keys, values = (np.asarray(x, np.float32) for x in (q, k[1], v[1]))
    want = plain_attention(queries, keys, values, offset, None)
    name = f"attention over a cache, {dtype}, {'a kernel' if fits_kernel(q) else 'blocks'}"
    return compare(name, got, want, FLOAT32 if dtype == "float32" else BFLOAT16)


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, offset: np.ndarray, window: int | None) -> np.ndarray:
    """Softmax attention with an explicit mask, float64: q [B, T, K, G, H], k and v [B, K, S, H], offset int [B]."""
    T, S, H = q.shape[1], k.shape[2], q.shape[-1]
    position = (offset[:, None] + np.arange(T))[..., None]
    mask = (np.arange(S) <= position) & (np.arange(S) > position - (window or S + T))
    scores = np.einsum("BTKGH,BKSH->BKGTS", q.astype(np.float64), k) * H**-0.5
    scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BKGTS,BKSH->BTKGH", weights / weights.sum(-1, keepdims=True), v)


def check_decode_kernel() -> list[Finding]:
    """One token's attention by the kernel, whether or not it is chosen, against the plain operations here."""
    findings = []
    for dtype, bound in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        name = f"attention of one token by the kernel, {dtype}"
        findings += tried(name, bound, partial(compare_decode_kernel, name, dtype, bound))
    return findings


def compare_decode_kernel(name: str, dtype: str, bound: float) -> list[Finding]:
    """Its result, and the caches that it leaves, for one share and for several."""
    with precision(dtype):
        found = decode_kernel.differences(dtype, 128, jax.devices()[0], interpret=jax.default_backend() == "cpu")
    return [Finding(f"{name}, {what}", worst, bound) for what, worst in found.items()]


def check_rope() -> list[Finding]:
    """Rotation at multimodal positions, large ones included, against the CPU."""
    rng = np.random.default_rng(2)
    positions = rng.uniform(0, 30_000, (3, 2, 50)).astype(np.float32).round(1)
    x = rng.standard_normal((2, 50, 4, 64), np.float32)
    config = RopeConfig(theta=1e6, mrope_section=(12, 10, 10))

    def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotate(x, *rope(positions, 64, config, jnp.dtype("float32")))

    # An angle of 30 000 radians is known to 2e-3 in float32, and cosines differ between devices by no more than that.
    return [compare("rope", jax.jit(rotated)(x, positions), on_cpu(rotated, x, positions), 4e-3)]


def check_cache() -> list[Finding]:
    """Writes at each row's own length, for one row and for several, against NumPy."""
    rng = np.random.default_rng(3)
    L, K, S, H, T = 3, 2, 32, 8, 4
    findings = []
    for B in (1, 3):
        start = rng.standard_normal((L, B, K, S, H), np.float32)
        new = rng.standard_normal((B, T, K, H), np.float32)
        length = np.asarray([0, 7, S - T][-B:], np.int32)
        want = start.copy()
        for b in range(B):
            want[1, b, :, length[b] : length[b] + T] = new[b].transpose(1, 0, 2)
        cache = KVCache(jnp.asarray(start), jnp.asarray(start), jnp.asarray(length))
        got = jax.jit(KVCache.write)(cache, jnp.int32(1), new, 2 * new)
        findings.append(compare(f"cache write, {B} rows", got.k, want, 0.0))
    return findings


def check_top_k() -> list[Finding]:
    """The likeliest of a vocabulary, found by blocks, among many that are equal: numbers and places against NumPy."""
    x = np.random.default_rng(9).integers(0, 3000, (2, 20_000)).astype(np.float32)
    want = np.argsort(-x, axis=-1, kind="stable")[:, :64]
    got, ids = jax.jit(lambda x: by_blocks(x, 64, BLOCK))(x)
    found = compare("top-k, numbers", got, np.take_along_axis(x, want, axis=-1), 0.0)
    return [found, compare("top-k, places", ids, want, 0.0)]


def check_thinker() -> list[Finding]:
    """A small Thinker, teacher-forced logits and greedy tokens, against the CPU with the same parameters."""
    config = small_thinker()
    declaration, cpu, device = declare(Thinker, config), jax.devices("cpu")[0], jax.devices()[0]
    prompts = np.random.default_rng(4).integers(0, config.text.vocab_size, (2, 40)).astype(np.int32)
    with precision("float32"):
        params = jax.device_put(random_params(declaration), cpu)
        there = jax.device_put(params, device)
        want_tokens = greedy(params, declaration, prompts, cpu)
        whole = np.concatenate([prompts, want_tokens[:, :-1]], axis=1)
        want = teacher_forced(params, declaration, whole, cpu)
        findings = [
            compare("small Thinker logits", teacher_forced(there, declaration, whole, device), want, LOGITS_FLOAT32)
        ]
        sure, got = margins(want[:, prompts.shape[1] - 1 :]), greedy(there, declaration, prompts, device)
        findings.append(same_tokens("small Thinker greedy tokens", got, want_tokens, sure))
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        want = teacher_forced(jax.tree.map(lambda p: p.astype(jnp.float32), half), declaration, whole, cpu)
    got = teacher_forced(jax.device_put(half, device), declaration, whole, device)
    name = "small Thinker logits, bfloat16, root mean square"
    return [*findings, root_mean_square(name, got, want, LOGITS_BFLOAT16)]


def random_params(declaration: Declaration) -> dict:
    """Random NumPy parameters, scales about one: a compiled initialisation would take longer than all checks."""
    rng = np.random.default_rng(5)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        values = rng.standard_normal(shape.shape, np.float32) / 16
        *modules, name = (key.key for key in path)
        is_scale = name.endswith("scale") or name == "gamma" or ("norm" in "".join(modules) and name == "weight")
        return 1 + values if is_scale else values

    return jax.tree_util.tree_map_with_path(leaf, declaration.shapes)


def small_thinker() -> ThinkerConfig:
    """The public Thinker with few and narrow layers."""
    full = OmniConfig.from_hf(config_dict("full")).thinker
    rope_config = RopeConfig(theta=1e6, mrope_section=(12, 10, 10))
    text = replace(
        full.text, num_layers=2, hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=16,
        experts_per_token=4, moe_intermediate_size=128, vocab_size=512, rope=rope_config,
    )  # fmt: skip
    encoder = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 256}
    vision = replace(full.vision, num_position_embeddings=16, deepstack_layers=(0, 1), **encoder)
    return replace(full, text=text, vision=vision, audio=replace(full.audio, conv_channels=8, **encoder))


@partial(jax.jit, static_argnames="declaration")
def all_logits(params: dict, token_ids: jax.Array, positions: jax.Array, *, declaration: Declaration) -> jax.Array:
    """Logits float32 [B, T, V] of text alone."""
    thinker = bind(declaration, params)
    return thinker(token_ids, positions)


def teacher_forced(params: dict, declaration: Declaration, token_ids: np.ndarray, device: Any) -> np.ndarray:
    """Logits float32 [B, T, V] after every token, computed on `device`."""
    B, T = token_ids.shape
    positions = np.broadcast_to(np.arange(T, dtype=np.float32), (3, B, T))
    with jax.default_device(device):
        return np.asarray(all_logits(*jax.device_put((params, token_ids, positions), device), declaration=declaration))


def text_request(prompts: np.ndarray, new: int) -> PrefillInput:
    """A request for `new` tokens after each of the prompts int32 [B, T], greedy and without stop ids."""
    B, T = prompts.shape
    batch = Batch.of_text(prompts)
    return PrefillInput(
        token_ids=batch.token_ids,
        length=np.full(B, T, np.int32),
        position_ids=batch.position_ids,
        rope_delta=batch.rope_delta,
        budget=np.full(B, new, np.int32),
        keys=row_keys(0, B),
        stop_ids=np.zeros(0, np.int32),
        values=Sampling().values(),
    )


def greedy(params: dict, declaration: Declaration, prompts: np.ndarray, device: Any) -> np.ndarray:
    """CHUNK greedy tokens int32 [B, CHUNK] after each prompt, computed on `device`."""
    request = text_request(prompts, CHUNK)
    plan = Sampling().plan(declaration.shapes["embed"].shape[0])
    with jax.default_device(device):
        params, request = jax.device_put((params, request), device)
        first, state, _ = prefill(params, request, None, declaration=declaration, plan=plan, capacity=256)
        rest, _ = decode_chunk(
            params, state, np.int32(CHUNK), request.stop_ids, request.values, declaration=declaration, plan=plan
        )
    return np.concatenate([np.asarray(first)[:, None], np.asarray(rest)[:, : CHUNK - 1]], axis=1)


def margins(logits: np.ndarray) -> np.ndarray:
    """By how much the best of the logits [..., V] exceeds the second best: [...]."""
    best = np.partition(logits, -2, axis=-1)
    return best[..., -1] - best[..., -2]


def same_tokens(name: str, got: np.ndarray, want: np.ndarray, sure: np.ndarray) -> Finding:
    """The largest of the reference's margins [B, T] at a row's first difference: 0 where rows [B, T] are equal."""
    first = [(row, int(np.argmax(row_differs))) for row, row_differs in enumerate(got != want) if row_differs.any()]
    return Finding(name, max((float(sure[at]) for at in first), default=0.0), MARGIN)
