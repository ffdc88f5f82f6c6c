"""The compiled speech loop: the Talker's prompt, then whole frames of codes.

`prefill_talker` runs the prompt and draws the first code of the first frame. `decode_frames` makes many frames on the device: the code
predictor adds a frame's other codes, their embeddings and the next text token are the Talker's next input, and the
Talker draws the first code of the frame after. A frame is one step of one program; the host reads several at once.

Both are pure functions of (params, ...). Rows keep their own length, position and key; none can be changed by another.

Source: transformers `Qwen3OmniMoeTalkerForConditionalGeneration.prepare_inputs_for_generation`. Deliberate difference:
a row that has ended stays ended, whatever its batch mates do.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax.config import CODEC_MARKS
from omni_jax.decode.sampling import Plan, sample
from omni_jax.models.code_predictor import CodePredictor
from omni_jax.models.param import Declaration, bind
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import KVCache, lay_over
from omni_jax.sharding import Array, place, place_rows, replicate

NO_CODE = -1


class SpeechPlan(NamedTuple):
    """The static part of drawing: for first codes, and for the other codes of a frame."""

    first: Plan
    residual: Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TalkerPrompt:
    """The columns of each row's prompt, right-padded; as `omni_jax.inputs.speech.SpeechPrompt` describes them.

    text_ids, hidden_index and codec_ids: int32 [B, U]. position_ids: float32 [3, B, U]. rope_delta: float32 [B].
    length: int32 [B]. budget: int32 [B], frames to make. keys: [B].
    """

    text_ids: Array
    hidden_index: Array
    codec_ids: Array
    position_ids: Array
    rope_delta: Array
    length: Array
    budget: Array
    keys: jax.Array

    def placed(self, mesh: Mesh | None) -> "TalkerPrompt":
        """The same prompts with their rows on the devices of `mesh` that will run them."""
        names = ("text_ids", "hidden_index", "codec_ids", "rope_delta", "length", "budget", "keys")
        rows = {name: place_rows(getattr(self, name), mesh) for name in names}
        return replace(self, position_ids=place(self.position_ids, (None, "batch", None), mesh), **rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechState:
    """Where each row stands.

    hidden [B, D]: the Talker's last normed state. code int32 [B]: the first code drawn from it, its frame not yet made.
    frames int32 []: frames made. rope_delta float32 [B]. done bool [B]. remaining int32 [B]: frames that may follow.
    seen bool [B, V]: first codes drawn; [B, 0] without a penalty. keys [B].
    """

    cache: KVCache
    hidden: jax.Array
    code: jax.Array
    frames: jax.Array
    rope_delta: jax.Array
    done: jax.Array
    remaining: jax.Array
    seen: jax.Array
    keys: jax.Array


@partial(jax.jit, static_argnames=("declaration", "plan", "capacity"))
def prefill_talker(
    params: dict,
    embed: jax.Array,
    prompt: TalkerPrompt,
    hidden: jax.Array | None,
    values: tuple[dict, dict],
    *,
    declaration: Declaration,
    plan: SpeechPlan,
    capacity: int,
) -> SpeechState:
    """Run the prompts and draw each row's first code.

    embed [V, D]: the Thinker's token embeddings. hidden [B, T, D]: its accepted hidden states, None without media.
    """
    talker: Talker = bind(declaration, params)
    text, B = talker.config.text, prompt.length.shape[0]
    x = _prompt_inputs(talker, embed, prompt, hidden)
    empty = KVCache.empty(text.num_layers, B, text.num_kv_heads, capacity, text.head_dim, x.dtype)
    out = talker.prefill(x, jnp.asarray(prompt.position_ids), empty)
    length = jnp.asarray(prompt.length)
    state = SpeechState(
        cache=replace(out.cache, length=length),
        hidden=jnp.take_along_axis(out.hidden, length[:, None, None] - 1, axis=1)[:, 0],
        code=jnp.zeros((B,), jnp.int32),
        frames=jnp.int32(0),
        rope_delta=jnp.asarray(prompt.rope_delta),
        done=jnp.asarray(prompt.budget) <= 0,
        remaining=jnp.asarray(prompt.budget),
        seen=jnp.zeros((B, text.vocab_size if plan.first.penalised else 0), bool),
        keys=prompt.keys,
    )
    return lay_over(_draw(talker, state, values[0], plan.first), declaration.mesh)


def _prompt_inputs(talker: Talker, embed: jax.Array, prompt: TalkerPrompt, hidden: jax.Array | None) -> jax.Array:
    """The columns of the prompt, [B, U, D]: text or what the Thinker made of media, plus a codec mark where one is."""
    x = talker.text_projection(embed[prompt.text_ids])
    if hidden is not None:
        index = jnp.asarray(prompt.hidden_index)[..., None]
        heard = jnp.take_along_axis(hidden, jnp.maximum(index, 0), axis=1)
        x = jnp.where(index >= 0, talker.hidden_projection(heard), x)
    codec = jnp.asarray(prompt.codec_ids)
    return x + jnp.where(codec[..., None] >= 0, talker.embed_codes(jnp.maximum(codec, 0)), 0)


@partial(jax.jit, static_argnames=("declaration", "plan", "unroll"), donate_argnames="state")
def decode_frames(
    params: dict,
    embed: jax.Array,
    state: SpeechState,
    text_ids: Array,
    frames: Array | int,
    values: tuple[dict, dict],
    *,
    declaration: Declaration,
    plan: SpeechPlan,
    unroll: int = 1,
) -> tuple[jax.Array, SpeechState]:
    """Make up to `frames` frames per row: codes int32 [B, Q, N], -1 where none, and the state to go on from.

    text_ids int32 [B, N]: what the reply says next, one token a frame; at most N frames are made. The cache must hold
    as many more columns as frames are made.
    """
    talker: Talker = bind(declaration, params)
    text = talker.text_projection(embed[text_ids])
    B, N = text_ids.shape
    codes = jnp.full((B, talker.config.num_code_groups, N), NO_CODE, jnp.int32)

    def step(carry: tuple) -> tuple:
        i, state, codes = carry
        frame, x = _frame(talker.code_predictor, talker.embed_codes(state.code), state, values[1], plan.residual)
        frame = jnp.where(state.done[:, None], NO_CODE, frame)
        codes = jax.lax.dynamic_update_slice(codes, frame[..., None], (0, 0, i))
        remaining = state.remaining - ~state.done
        state = replace(state, remaining=remaining, done=state.done | (remaining <= 0), frames=state.frames + 1)
        x = x + jax.lax.dynamic_index_in_dim(text, i, axis=1, keepdims=False)
        x = x.astype(text.dtype)
        return i + 1, _draw(talker, _listen(talker, x, state, unroll), values[0], plan.first), codes

    def going(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < jnp.minimum(frames, N)) & ~jnp.all(state.done)

    _, state, codes = jax.lax.while_loop(going, step, (jnp.int32(0), state, codes))
    return replicate(codes, declaration.mesh), lay_over(state, declaration.mesh)


def grow(state: SpeechState, *, capacity: int) -> SpeechState:
    """The same state with a cache of `capacity` slots; the one given is given up."""
    return replace(state, cache=state.cache.grow(capacity))


def _listen(talker: Talker, x: jax.Array, state: SpeechState, unroll: int) -> SpeechState:
    """Run one input [B, D] per row through the Talker."""
    position = state.cache.length + state.rope_delta
    position = jnp.broadcast_to(position[None, :, None], (3, position.shape[0], 1))
    out = talker.extend(x[:, None], position, state.cache, unroll=unroll)
    cache = replace(out.cache, length=jnp.where(state.done, state.cache.length, out.cache.length))
    return replace(state, hidden=out.hidden[:, 0], cache=cache)


def _draw(talker: Talker, state: SpeechState, values: dict, plan: Plan) -> SpeechState:
    """Draw the first code of each row's next frame; the end mark ends a row without a frame."""
    config = talker.config
    ids = jnp.arange(config.text.vocab_size)
    mark = (ids >= config.text.vocab_size - CODEC_MARKS) & (ids != config.codec_eos_id)
    logits = jnp.where(mark, -jnp.inf, talker.logits(state.hidden))
    at = jnp.full(state.code.shape, state.frames * config.num_code_groups)
    code = sample(logits, state.keys, at, state.seen, values, plan)
    seen = state.seen
    if plan.penalised:
        seen = seen.at[jnp.arange(code.shape[0]), code].set(True)
    done = state.done | (code == config.codec_eos_id)
    return replace(state, code=jnp.where(done, 0, code), done=done, seen=seen)


def _frame(
    predictor: CodePredictor, first: jax.Array, state: SpeechState, values: dict, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """The codes int32 [B, Q] of the frame that `state.code` opens (embedded: `first` [B, D]), and their sum.

    The sum float32 [B, D] is of the codes' embeddings: many small numbers, which half precision would round each.
    """
    config = predictor.config
    B, Q = first.shape[0], predictor.embed.shape[0] + 1
    cache = KVCache.empty(config.num_layers, B, config.num_kv_heads, Q, config.head_dim, first.dtype)
    opened = predictor.extend(jnp.stack([state.hidden, first], axis=1), cache)

    def draw(hidden: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
        at = jnp.full((B,), state.frames * Q + i + 1)
        code = sample(predictor.logits(hidden, i), state.keys, at, None, values, plan)
        return code, predictor.embed_code(code, i)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        hidden, cache, total = carry
        code, x = draw(hidden, i)
        out = predictor.extend(x[:, None], cache)
        return (out.hidden[:, 0], out.cache, total + x), code

    carry = (opened.hidden[:, -1], opened.cache, first.astype(jnp.float32))
    (hidden, _, total), codes = jax.lax.scan(step, carry, jnp.arange(Q - 2))
    last, x = draw(hidden, Q - 2)
    return jnp.concatenate([state.code[:, None], codes.T, last[:, None]], axis=1), total + x
