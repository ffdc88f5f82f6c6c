"""Teacher-forced logits, prefill and the compiled decode loop.

`prefill` runs the prompt, or what `read_piece` has left of it, and draws the first token; `decode_chunk` runs many
single-token steps on the device and returns their tokens at once, ending early when every row is done. Both are pure
functions of (params, ...): the module declaration and the sampling plan are static. The state is donated, so the cache
is updated in place.

Rows are right-padded and keep their own length, position and key: no row can see, or be changed by, another.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax.decode.compiling import LOOP_OPTIONS
from omni_jax.decode.sampling import Plan, sample
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Media
from omni_jax.ops.cache import KVCache, lay_over
from omni_jax.ops.top_k import top_k
from omni_jax.sharding import Array, place, place_rows, replicate, replicate_for_hosts

NO_TOKEN = -1
CHUNK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What is known of each row.

    token int32 [B]: drawn, not yet run. done bool [B]. remaining int32 [B]: tokens that may still be drawn.
    seen bool [B, V], or [B, 0] without a penalty. keys: [B].
    """

    token: jax.Array
    done: jax.Array
    remaining: jax.Array
    seen: jax.Array
    keys: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a decoding loop carries. rope_delta float32 [B]: position minus index of generated tokens."""

    cache: KVCache
    rope_delta: jax.Array
    rows: Rows

    def positions(self, offset: jax.Array) -> jax.Array:
        """Positions float32 [3, B, T] of tokens at `offset` int32 [T] or [B, T] after what the cache holds."""
        at = (self.cache.length + self.rope_delta)[:, None] + offset
        return jnp.broadcast_to(at, (3, *at.shape))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillInput:
    """What prefill needs besides the parameters.

    token_ids int32 [B, T], right-padded; length int32 [B]; position_ids float32 [3, B, T]; rope_delta float32 [B];
    budget int32 [B * n], tokens to draw; keys [B * n], for n replies to each prompt; stop_ids int32 [m], or [B * n, m]
    of each row; values: the sampling values, see `sampling`.
    """

    token_ids: Array
    length: Array
    position_ids: Array
    rope_delta: Array
    budget: Array
    keys: jax.Array
    stop_ids: Array
    values: dict

    def placed(self, mesh: Mesh | None) -> "PrefillInput":
        """The same request with its rows on the devices of `mesh` that will run them."""
        names = ("token_ids", "length", "rope_delta", "budget", "keys")
        rows = {name: place_rows(getattr(self, name), mesh) for name in names}
        return replace(self, position_ids=place(self.position_ids, (None, "batch", None), mesh), **rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """What goes before the tokens of a prefill: its cache, and which tokens it holds.

    seen: bool [B, V], or [B, 0] without a penalty.
    """

    cache: KVCache
    seen: Array


def empty_cache(params: dict, *, declaration: Declaration, capacity: int) -> KVCache:
    """A cache of one row that holds nothing, bound to the devices of the parameters.

    So it is once a program has filled it; programs would compile twice for one that is not.
    """
    cache = bind(declaration, params).empty_cache(1, capacity)
    return cache if declaration.mesh is not None else jax.device_put(cache, params["embed"].sharding)


@partial(jax.jit, static_argnames=("declaration", "taps"), donate_argnames="cache")
def read_piece(
    params: dict,
    token_ids: Array,
    position_ids: Array,
    media: Media | None,
    cache: KVCache,
    *,
    declaration: Declaration,
    taps: tuple[int, ...] = (),
) -> tuple[KVCache, jax.Array]:
    """Run a piece of prompts, int32 [B, T] at positions float32 [3, B, T], after what the cache holds.

    The cache must have room for it. Returns the cache that holds it too, and hidden states [n, B, T, D] of the numbers
    `taps`. media: for the tokens of the piece.
    """
    thinker = bind(declaration, params)
    x = thinker.embed_tokens(jnp.asarray(token_ids), media)
    out = thinker.extend(x, jnp.asarray(position_ids), cache, taps=taps, media=media)
    return lay_over(out.cache, declaration.mesh), out.taps


@partial(jax.jit, static_argnames=("declaration", "plan", "capacity", "taps"), donate_argnames="held")
def prefill(
    params: dict,
    request: PrefillInput,
    media: Media | None,
    *,
    declaration: Declaration,
    plan: Plan,
    capacity: int,
    taps: tuple[int, ...] = (),
    held: Held | None = None,
) -> tuple[jax.Array, DecodeState, jax.Array]:
    """Run the prompts and draw each row's first token: int32 [B], the next state, and hidden states [n, B, T, D].

    taps: numbers of these hidden states. Tokens are as `reported` gives them. A prompt runs once, whatever the number
    of keys that the request has for it; all results then have a row for each key. held: what goes before the tokens of
    the request, in a cache of this capacity that has room for T more.
    """
    thinker = bind(declaration, params)
    text = thinker.config.text
    B = request.token_ids.shape[0]
    x = thinker.embed_tokens(request.token_ids, media)
    positions = jnp.asarray(request.position_ids)
    if held is None:
        empty = KVCache.empty(text.num_layers, B, text.num_kv_heads, capacity, text.head_dim, x.dtype)
        out = thinker.prefill(x, positions, empty, media=media, taps=taps)
    else:
        out = thinker.extend(x, positions, held.cache, media=media, taps=taps)
    cache, tapped = out.cache, out.taps
    length, rope_delta = jnp.asarray(request.length), jnp.asarray(request.rope_delta)
    last = jnp.take_along_axis(out.hidden, length[:, None, None] - 1, axis=1)[:, 0]
    budget = jnp.asarray(request.budget)
    rows = Rows(
        token=jnp.zeros(budget.shape, jnp.int32),
        done=budget <= 0,
        remaining=budget,
        seen=_seen_in_prompt(request, text.vocab_size, held) if plan.penalised else jnp.zeros((len(budget), 0), bool),
        keys=request.keys,
    )
    length = length if held is None else length + held.cache.length
    if (n := len(budget) // B) > 1:
        length, rope_delta, last = (jnp.repeat(x, n, axis=0) for x in (length, rope_delta, last))
        cache, tapped = cache.repeat(n), jnp.repeat(tapped, n, axis=1)
    logits = thinker.logits(last)
    token, rows = draw(logits, rows, length, request.stop_ids, request.values, plan)
    state = DecodeState(replace(cache, length=length), rope_delta, rows)
    return replicate(reported(token, logits, plan), declaration.mesh), lay_over(state, declaration.mesh), tapped


@partial(
    jax.jit,
    static_argnames=("declaration", "plan", "unroll"),
    donate_argnames="state",
    compiler_options=LOOP_OPTIONS,
)
def decode_chunk(
    params: dict,
    state: DecodeState,
    steps: Array | int,
    stop_ids: Array,
    values: dict,
    *,
    declaration: Declaration,
    plan: Plan,
    unroll: int | None = None,
    until: Array | int | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Draw up to `steps` (at most CHUNK) tokens per row: int32 [B, CHUNK], -1 where none, and the next state.

    Tokens are as `reported` gives them. stop_ids: int32 [m], or [B, m] of each row. values: the sampling values, see
    `sampling`. until: the number of done rows at which it ends early, by default all. The cache must hold `steps` more
    tokens. Rows that are done neither move nor write anything that is read.
    """
    thinker = bind(declaration, params)
    tokens = jnp.full((state.rows.token.shape[0], CHUNK, *reported_shape(plan)), NO_TOKEN, jnp.int32)

    def step(carry: tuple) -> tuple:
        i, state, tokens = carry
        x = thinker.embed_tokens(state.rows.token[:, None])
        out = thinker.extend(x, state.positions(jnp.arange(1)), state.cache, unroll=unroll)
        cache = replace(out.cache, length=jnp.where(state.rows.done, state.cache.length, out.cache.length))
        logits = thinker.logits(out.hidden[:, 0])
        token, rows = draw(logits, state.rows, cache.length, stop_ids, values, plan)
        at = (0, i, *(0,) * len(reported_shape(plan)))
        tokens = jax.lax.dynamic_update_slice(tokens, reported(token, logits, plan)[:, None], at)
        return i + 1, replace(state, cache=cache, rows=rows), tokens

    enough = len(tokens) if until is None else until

    def going(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & (jnp.sum(state.rows.done) < enough)

    _, state, tokens = jax.lax.while_loop(going, step, (0, state, tokens))
    return replicate(tokens, declaration.mesh), lay_over(state, declaration.mesh)


@partial(jax.jit, static_argnames="declaration")
def forward(
    params: dict,
    token_ids: jax.Array,
    position_ids: jax.Array,
    first_valid: jax.Array,
    media: Media | None,
    *,
    declaration: Declaration,
) -> jax.Array:
    """Logits float32 [B, T, V] of whole sequences int32 [B, T] at positions [3, B, T], real from `first_valid` [B] on.

    Every process can read them.
    """
    thinker = bind(declaration, params)
    x = thinker.embed_tokens(token_ids, media)
    out = thinker.forward(x, position_ids, first_valid, media)
    return replicate_for_hosts(thinker.logits(out.hidden), declaration.mesh)


def grow(state: DecodeState, *, capacity: int) -> DecodeState:
    """The same state with a cache of at least `capacity` positions; the argument must not be used afterwards."""
    return replace(state, cache=state.cache.grow(capacity))


def draw(
    logits: jax.Array, rows: Rows, position: jax.Array, stop_ids: Array, values: dict, plan: Plan
) -> tuple[jax.Array, Rows]:
    """Sample each row's token at `position` int32 [B] from logits [B, V]: int32 [B], -1 where done, and the new rows.

    Stop ids (int32 [m], or [B, m]) and the budget end a row after their token.
    """
    return record(sample(logits, rows.keys, position, rows.seen, values, plan), rows, stop_ids, plan)


@jax.named_scope("record")
def record(drawn: jax.Array, rows: Rows, stop_ids: Array, plan: Plan) -> tuple[jax.Array, Rows]:
    """Record the token sampled for each row, int32 [B]: these tokens, -1 for rows that are done, and the new rows.

    stop_ids: int32 [m], or [B, m] of each row.
    """
    token = jnp.where(rows.done, NO_TOKEN, drawn)
    remaining = rows.remaining - ~rows.done
    done = rows.done | jnp.any(drawn[:, None] == stop_ids, axis=1) | (remaining <= 0)
    seen = rows.seen
    if plan.penalised:
        seen = seen.at[jnp.arange(token.shape[0]), jnp.maximum(token, 0)].max(token >= 0)
    rows = replace(rows, token=jnp.where(done, rows.token, drawn), done=done, remaining=remaining, seen=seen)
    return token, rows


def reported_shape(plan: Plan) -> tuple[int, ...]:
    """What `reported` adds to the shape of tokens."""
    return () if plan.top_logprobs is None else (2 + 2 * plan.top_logprobs,)


@jax.named_scope("report")
def reported(token: jax.Array, logits: jax.Array, plan: Plan) -> jax.Array:
    """Tokens int32 [...] as programs give them to the host, drawn from the raw logits [..., V].

    With log-probabilities in the plan, int32 [..., 2 + 2k]: the token, its log-probability, then ids and
    log-probabilities of the k likeliest; log-probabilities are bits of float32. One array, because each read costs.
    """
    if plan.top_logprobs is None:
        return token
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_probs, jnp.maximum(token, 0)[..., None], axis=-1)
    top, ids = top_k(log_probs, plan.top_logprobs)
    bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jnp.concatenate([token[..., None], bits(own), ids, bits(top)], axis=-1)


def _seen_in_prompt(request: PrefillInput, vocab_size: int, held: Held | None = None) -> jax.Array:
    B, T = request.token_ids.shape
    inside = jnp.arange(T) < request.length[:, None]
    seen = jnp.zeros((B, vocab_size), bool) if held is None else jnp.asarray(held.seen)
    seen = seen.at[jnp.arange(B)[:, None], request.token_ids].max(inside)
    return jnp.repeat(seen, len(request.budget) // B, axis=0)
