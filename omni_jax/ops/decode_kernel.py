"""The attention of one token per row after what a cache holds, from its query, key and value heads on, in one kernel.

    heads [B, K, G + 2, H] -> norms of queries and key, rotation -> the cache's next slot -> attention -> [B, K, G, H]

`plain` states what is computed, by the operations that several tokens take too. `fused` computes the same as one kernel
for each row, key head and share of the row's slots, and a second one that joins the shares where there are several. A
program reads whole blocks of slots, each `shares` after the last; the row's own token is in its registers, so no
program waits for another one's write.

A process that has a Hopper GPU first compares both there, for two made caches, and uses the kernel if they agree. It is
written in the Triton form of Pallas, which JAX 0.12 deprecates: the Mosaic form reduces no single axis of what a
program loads, and JAX 0.10 interprets too little of it on a CPU for a test.

Differs from `plain` where a row is full, which no caller lets happen: the row's own token is then seen, and not kept.

Source: split keys as in Flash-Decoding (Dao et al. 2023), running softmax as in FlashAttention (Dao et al. 2022).
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache as cached
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import InputError
from omni_jax.ops.attention import MASKED, causal_attention
from omni_jax.ops.cache import KVCache
from omni_jax.ops.norm import rms_norm
from omni_jax.ops.rope import rotate
from omni_jax.sharding import Array, first_device, is_hopper, platform

# The environment variable that chooses the kernel: "on", "off", or "auto", on where it agrees with `plain`.
SWITCH = "OMNI_JAX_DECODE_KERNEL"
# The largest difference from `plain` that rounding explains, in parts of a row's largest number.
ROUNDING = 2e-2
# Slots that a program reads together, and the fewest: a tile of a product has 16 of everything.
BLOCK, TILE = 64, 16
# Programs that keep a device busy, and the slots up to which a row is one share.
PROGRAMS, ONE_SHARE = 512, 256


@dataclass(frozen=True)
class Norms:
    """Weights of the norms of queries and keys, [L, H] each, and what is added to a mean square."""

    q: jax.Array
    k: jax.Array
    eps: float


@dataclass(frozen=True)
class OneToken:
    """What a token sees: slots from first_valid int32 [B] on, 0 by default, and at most `window`, itself included.

    offset: of the layer's number, what a program adds itself, so that layers of one turn of a loop share one array.
    """

    first_valid: Array | None = None
    window: int | None = None
    offset: int = 0


# What the kernel is compared with `plain` for: slots, tokens that each row holds, and what the token sees. The first
# has a row that is padded on the left; the other is a code predictor's.
EXAMPLES = (
    (1024, (5, 700, 1023), OneToken(np.asarray([0, 70, 0], np.int32))),
    (TILE, (0, 9, TILE - 1), OneToken(offset=1)),
)
KV_HEADS = 2

Rope = tuple[jax.Array, jax.Array]
# The largest score of each query so far [R], the sum of its weights [R], of its weighted values [R, H]; float32.
State = tuple[jax.Array, jax.Array, jax.Array]
# Columns [n, H] of something, by their numbers [H].
Columns = Callable[[jax.Array], jax.Array]


def chosen(x: jax.Array, cache: KVCache, head_dim: int, first_valid: jax.Array | None) -> bool:
    """Whether `fused` is to compute the attention of x [B, T, D] over a cache, all of it on one device.

    InputError if the environment variable is none of its words.
    """
    stated = os.environ.get(SWITCH, "auto")
    if stated not in ("auto", "on", "off"):
        raise InputError(f'{SWITCH}="{stated}" is neither auto nor on nor off; unset it for auto')
    if stated == "off" or platform() != "gpu" or not is_hopper():
        return False
    if x.shape[1] != 1 or not fits(x.dtype, cache, head_dim, first_valid):
        return False
    return stated == "on" or agrees(str(x.dtype), head_dim, first_device())


@cached
def agrees(dtype: str, head_dim: int, device: Any) -> bool:
    """Whether the kernel gives on this GPU what `plain` gives, for both of `EXAMPLES`; else a warning says why not.

    True for a CPU, where a program is compiled for another machine. May be asked while a program is traced.
    """
    if device.platform == "cpu":
        return True
    try:
        # What is traced in this thread would take the comparison in.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(differences, dtype, head_dim, device).result()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it cannot be compiled or run here ({said[:200]})"
    else:
        if all(difference <= ROUNDING for difference in found.values()):
            return True
        reason = f"it differs from the plain operations by up to {max(found.values()):.2g} of a row's largest number"
    warnings.warn(
        f"the kernel for one token's attention is not used: {reason}; {SWITCH}=off leaves the comparison out",
        stacklevel=2,
    )
    return False


def differences(dtype: str, head_dim: int, device: Any = None, interpret: bool = False) -> dict[str, float]:
    """How far the kernel is from `plain` on a device, for made rows: by slots, shares and what differs.

    In parts of a row's largest number: of the result [B, K, G, H], and of the caches [L, B, K, S, H] that are left.
    """
    found = {}
    with jax.default_device(device):
        for slots, lengths, token in EXAMPLES:
            given = example(dtype, head_dim, slots, lengths)
            wanted = _left_by(plain, given, token)
            for shares in sorted({1, shares_of(len(lengths), KV_HEADS, slots)}):
                got = _left_by(partial(fused, interpret=interpret, shares=shares), given, token)
                for name, want in wanted.items():
                    worst = np.abs(got[name] - want).max(axis=-1) / np.abs(want).max(axis=-1)
                    # A number that is none is no agreement.
                    found[f"{slots} slots, {shares} shares, {name}"] = float(np.nan_to_num(worst, nan=np.inf).max())
    return found


def example(dtype: str, head_dim: int, slots: int, lengths: tuple[int, ...]) -> tuple[jax.Array, Rope, KVCache, Norms]:
    """Made heads [B, K, 10, H], rotation, caches [2, B, K, slots, H] and norms of a stack of two layers."""
    rng, (L, B, K, H) = np.random.default_rng(6), (2, len(lengths), KV_HEADS, head_dim)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    angle = rng.uniform(0, 6, (B, 1, H))
    rope = jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)
    cache = KVCache(normal(L, B, K, slots, H), normal(L, B, K, slots, H), jnp.asarray(lengths, jnp.int32))
    return normal(B, K, 10, H), rope, cache, Norms(normal(L, H), normal(L, H), 1e-6)


def _left_by(function: Any, given: tuple, token: OneToken) -> dict[str, np.ndarray]:
    """What `plain` or the kernel gives for the second layer, and the caches then: float32, one line for each row."""
    heads, rope, cache, norms = given
    out, left = jax.jit(lambda l: function(heads, rope, cache, l, norms, token))(jnp.int32(1))
    arrays = {"result": out, "keys": left.k.swapaxes(0, 1), "values": left.v.swapaxes(0, 1)}
    return {name: np.asarray(x, np.float32).reshape(cache.rows, -1) for name, x in arrays.items()}


def fits(dtype: Any, cache: KVCache, head_dim: int, first_valid: jax.Array | None) -> bool:
    """Whether the kernel is made for activations of `dtype`, for this cache, and for rows that begin at first_valid."""
    block = min(BLOCK, cache.capacity)
    power = head_dim & (head_dim - 1) == 0 and block & (block - 1) == 0
    whole = power and head_dim >= TILE and block >= TILE and cache.capacity % block == 0
    same = dtype == cache.k.dtype and dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    return whole and same and (first_valid is None or first_valid.ndim == 1)


def plain(
    heads: jax.Array, rope: Rope, cache: KVCache, l: Any, norms: Norms | None, token: OneToken
) -> tuple[jax.Array, KVCache]:
    """Attention of one token per row at layer `l`: [B, K, G, H], and the cache with the token's key and value.

    heads: [B, K, G + 2, H], G queries, a key and a value for each of K, rounded here to the type of the rest. rope: cos
    and sin [B, 1, H]. l: int32 [] or a number. norms: of queries and keys; None without.
    """
    heads = heads.astype(cache.k.dtype)
    q, k, v = heads[:, None, :, :-2], heads[:, None, :, -2], heads[:, None, :, -1]
    if norms is not None:
        q, k = rms_norm(q, norms.q[l], norms.eps), rms_norm(k, norms.k[l], norms.eps)
    q, k = rotate(q, *rope), rotate(k, *rope)
    cache, first = cache.write(l, k, v), None if token.first_valid is None else jnp.asarray(token.first_valid)
    return causal_attention(q, cache.k[l], cache.v[l], cache.length, first, token.window)[:, 0], cache


def shares_of(rows: int, kv_heads: int, capacity: int) -> int:
    """Into how many programs the slots of a row are divided: a power of two, no more than it has blocks."""
    if capacity <= ONE_SHARE:
        return 1
    wanted = min(-(-PROGRAMS // (rows * kv_heads)), capacity // BLOCK)
    return 1 << (wanted.bit_length() - 1)


def fused(
    heads: jax.Array,
    rope: Rope,
    cache: KVCache,
    l: Any,
    norms: Norms | None,
    token: OneToken,
    interpret: bool = False,
    shares: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """As `plain`, by the kernel. interpret: on any device, slowly. shares: by default as `shares_of`."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    B, K, N, H = heads.shape
    G, S = N - 2, cache.capacity
    R = max(TILE, 1 << (G - 1).bit_length())
    shares = shares_of(B, K, S) if shares is None else shares
    first = () if token.first_valid is None else (token.first_valid,)
    weights = () if norms is None else (norms.q, norms.k)
    cos, sin = (a[:, 0] for a in rope)
    layer = jnp.reshape(l - token.offset, (1,)).astype(jnp.int32)
    arrays = (layer, cache.length, heads, cos, sin, *first, *weights, cache.k, cache.v)
    described, dtype = jax.ShapeDtypeStruct, cache.k.dtype
    out = [described((B, K, G, H), dtype)]
    if shares > 1:
        out = [described((B, K, G, shares, H), jnp.float32), *[described((B, K, G, shares), jnp.float32)] * 2]
    kept = [described(cache.k.shape, dtype)] * 2
    call = pl.pallas_call(
        partial(_share, (G, R, shares), None if norms is None else norms.eps, token),
        grid=(B, K, shares),
        out_shape=(*kept, *out),
        input_output_aliases={len(arrays) - 2: 0, len(arrays) - 1: 1},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )
    k, v, *found = call(*arrays)
    cache = replace(cache, k=k, v=v)
    return (found[0] if shares == 1 else _joined(found, dtype, interpret)), cache


def _share(
    sizes: tuple[int, int, int], eps: float | None, token: OneToken, layer: Any, length: Any, heads: Any, cos: Any,
    sin: Any, *refs: Any,
) -> None:  # fmt: skip
    """One program: a share of the slots of one row and key head, for its G queries as R rows of a tile.

    sizes: G, R, and how many shares there are. refs: first_valid and the weights of norms where there are any, then
    caches, and what is written: the caches again, and the result or the share's state.
    """
    import jax.experimental.pallas as pl

    G, R, shares = sizes
    firsts, refs = (refs[:1], refs[1:]) if token.first_valid is not None else ((), refs)
    weights, (keys, values, new_keys, new_values, *out) = (refs[:2], refs[2:]) if eps is not None else ((), refs)
    b, k, share = (pl.program_id(i) for i in range(3))
    at, tokens = layer[0] + token.offset, length[b]
    (S, H), dtype = keys.shape[-2:], keys.dtype
    # Rows beyond the last query repeat it.
    row = jnp.minimum(jnp.arange(R), G - 1)[:, None]
    turn = partial(
        _turned, cos=partial(_of_row, cos, b), sin=partial(_of_row, sin, b), H=H, dtype=dtype, eps=eps or 0.0
    )
    scale = [partial(_of_row, weight, at) for weight in weights] or [None, None]
    q = turn(lambda column: heads[b, k, row, column[None]], scale[0])
    key = turn(lambda column: heads[b, k, G, column][None], scale[1])
    value = heads[b, k, G + 1].astype(dtype)

    @pl.when((share == 0) & (tokens < S))
    def _() -> None:
        new_keys[at, b, k, tokens] = key[0]
        new_values[at, b, k, tokens] = value

    start = firsts[0][b] if firsts else 0
    start = start if token.window is None else jnp.maximum(start, tokens - token.window + 1)
    block = min(BLOCK, S)
    begin, end = start // block + share, (jnp.minimum(tokens, S) + block - 1) // block

    def step(i: Any, state: State) -> State:
        at_block = (begin + i * shares) * block
        slots, slot = (at, b, k, pl.ds(at_block, block)), at_block + jnp.arange(block)
        return _seen(q, keys[slots], values[slots], (start <= slot) & (slot < tokens), state)

    turns = jnp.maximum(end - begin + shares - 1, 0) // shares
    _give(out, b, k, share, G, jax.lax.fori_loop(0, turns, step, _own(q, key, value, share)))


def _of_row(ref: Any, i: Any, column: jax.Array) -> jax.Array:
    """Columns [H] of row `i` of a ref [n, H], float32 [1, H]."""
    return ref[i, column].astype(jnp.float32)[None]


def _turned(
    load: Columns, scale: Columns | None, cos: Columns, sin: Columns, H: int, dtype: Any, eps: float
) -> jax.Array:
    """Heads [n, H], of which `load` gives columns, normalised if there is a scale, and rotated, in `dtype`.

    Columns are loaded twice, as they are and with their halves exchanged: a program does not move what it has loaded.
    """

    def rounded(a: jax.Array) -> jax.Array:
        return a.astype(dtype).astype(jnp.float32)

    column = jnp.arange(H)
    other = (column + H // 2) & (H - 1)
    x, y = rounded(load(column)), rounded(load(other))
    if scale is not None:
        factor = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) / H + eps)
        # Rounded where `rms_norm` rounds.
        x, y = (rounded(rounded(a * factor) * rounded(scale(at))) for a, at in ((x, column), (y, other)))
    y = jnp.where(column < H // 2, -1.0, 1.0)[None] * y
    return (x * cos(column) + y * sin(column)).astype(dtype)


def _own(q: jax.Array, key: jax.Array, value: jax.Array, share: Any) -> State:
    """What queries [R, H] have seen in the first share before any slot, the token itself; in others, nothing.

    key [1, H], value [H].
    """
    R, H = q.shape
    first = jnp.broadcast_to(share, (R,)) == 0
    score = jnp.sum(q.astype(jnp.float32) * key.astype(jnp.float32), axis=-1) * H**-0.5
    total = jnp.where(first, 1.0, 0.0)
    return jnp.where(first, score, MASKED), total, total[:, None] * value.astype(jnp.float32)[None]


def _seen(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, state: State) -> State:
    """The state once queries [R, H] have read keys and values [n, H] of a block, as far as bool [n] says."""
    import jax.experimental.pallas.triton as triton

    largest, total, sums = state
    scores = triton.dot(q, keys, trans_b=True, allow_tf32=False) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[None], scores, MASKED)
    new = jnp.maximum(largest, jnp.max(scores, axis=-1))
    weights, kept = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
    read = triton.dot(weights.astype(values.dtype), values, allow_tf32=False)
    return new, kept * total + jnp.sum(weights, axis=-1), kept[:, None] * sums + read


def _give(out: list, b: Any, k: Any, share: Any, G: int, state: State) -> None:
    """Write what a program has found: the result, or the state of its share."""
    import jax.experimental.pallas.triton as triton

    largest, total, sums = state
    R, H = sums.shape
    # What lies beyond the last query is written nowhere.
    row, column = jnp.arange(R), jnp.arange(H)[None]
    query = row < G
    whole = jnp.broadcast_to(query[:, None], (R, H))
    if len(out) == 1:
        result = (sums / total[:, None]).astype(out[0].dtype)
        triton.store(out[0].at[b, k, row[:, None], column], result, mask=whole)
        return
    triton.store(out[0].at[b, k, row[:, None], share, column], sums, mask=whole)
    for ref, found in zip(out[1:], (largest, total), strict=True):
        triton.store(ref.at[b, k, row, share], found, mask=query)


def _joined(states: list[jax.Array], dtype: Any, interpret: bool) -> jax.Array:
    """Shares joined: sums [B, K, G, shares, H], largest and total [B, K, G, shares] -> [B, K, G, H]."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    B, K, G, _, H = states[0].shape
    return pl.pallas_call(
        _join,
        grid=(B, K, G),
        out_shape=jax.ShapeDtypeStruct((B, K, G, H), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_attention_join",
    )(*states)


def _join(sums: Any, largest: Any, total: Any, out: Any) -> None:
    """One program of `_joined`: one query."""
    import jax.experimental.pallas as pl

    at = tuple(pl.program_id(i) for i in range(3))
    found = largest[at]
    weights = jnp.exp(found - jnp.max(found))
    joined = jnp.sum(weights[:, None] * sums[at], axis=0) / jnp.sum(weights * total[at])
    out[at] = joined.astype(out.dtype)
