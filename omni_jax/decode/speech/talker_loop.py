"""The compiled speech loop: the Talker's prompt, then whole frames of codes.

`prefill_talker` runs the prompt and draws the first code of the first frame. `decode_frames` makes many frames on the
device: the code predictor adds a frame's other codes; their embeddings and the next text token are the Talker's next
input; and the Talker draws the first code of the next frame. A frame is one step of one program; the host reads several
frames at once.

Both are pure functions of (params, ...). Every row has its own length, position, key and number of frames, and may make
as many frames as its own text allows; no row can be changed by another.

Source: transformers `Qwen3OmniMoeTalkerForConditionalGeneration.prepare_inputs_for_generation`. Deliberate difference:
a row that has ended stays ended, whatever the other rows of its batch do.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax.config import CODEC_MARKS
from omni_jax.decode.compiling import LOOP_OPTIONS
from omni_jax.decode.sampling import Plan, sample
from omni_jax.decode.text import Rows
from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.models.code_predictor import CodePredictor
from omni_jax.models.param import Declaration, bind
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import KVCache, lay_over
from omni_jax.sharding import Array, place, place_rows, replicate

NO_CODE = -1
# The most frames of one chunk.
FRAMES = 32

jax.tree_util.register_dataclass(SpeechPrompt)


@dataclass(frozen=True)
class SpeechPlan:
    """The static part of drawing: for first codes, and for the other codes of a frame."""

    first: Plan
    residual: Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechValues:
    """The traced part of drawing: for first codes, and for the other codes of a frame."""

    first: dict
    residual: dict


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TalkerPrompt:
    """What the Talker reads before its first frame, and how its rows draw.

    prompt: rows of U columns. budget: int32 [B], the most frames that each row makes. keys: [B].
    """

    prompt: SpeechPrompt
    budget: Array
    keys: jax.Array

    def placed(self, mesh: Mesh | None) -> "TalkerPrompt":
        """The same prompts with their rows on the devices of `mesh` that will run them."""
        names = [field.name for field in fields(SpeechPrompt) if field.name != "position_ids"]
        rows = {name: place_rows(getattr(self.prompt, name), mesh) for name in names}
        positions = place(self.prompt.position_ids, (None, "batch", None), mesh)
        prompt = SpeechPrompt(**rows, position_ids=positions)
        return TalkerPrompt(prompt, place_rows(self.budget, mesh), place_rows(self.keys, mesh))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechState:
    """What the speech loop carries; all its arrays have rows first, except those of the cache.

    hidden [B, D]: the Talker's last normed state. frames int32 [B]: frames that each row has made. rope_delta float32
    [B]: position minus index of columns after the prompt. rows: the first code of each row's next frame as its token,
    the frames that may follow as `remaining`, and the first codes drawn so far as `seen`.
    """

    cache: KVCache
    hidden: jax.Array
    frames: jax.Array
    rope_delta: jax.Array
    rows: Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frames:
    """What a chunk gives to the host: codes int32 [B, Q, N], -1 where none, and which rows are done, bool [B]."""

    codes: jax.Array
    done: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loop:
    """The loop of one chunk after `step` steps (int32 []): the state, and codes int32 [B, Q, N], -1 where none."""

    step: jax.Array
    state: SpeechState
    codes: jax.Array


@partial(jax.jit, static_argnames=("declaration", "plan", "capacity"))
def prefill_talker(
    params: dict,
    embed: jax.Array,
    request: TalkerPrompt,
    hidden: jax.Array | None,
    values: SpeechValues,
    *,
    declaration: Declaration,
    plan: SpeechPlan,
    capacity: int,
) -> SpeechState:
    """Run the prompts and draw each row's first code.

    embed [V, D]: the Thinker's token embeddings. hidden [B, T, D]: its accepted hidden states, None without media.
    capacity: columns that the cache holds.
    """
    talker: Talker = bind(declaration, params)
    text, prompt, B = talker.config.text, request.prompt, request.budget.shape[0]
    x = prompt_inputs(talker, embed, prompt, hidden)
    empty = KVCache.empty(text.num_layers, B, text.num_kv_heads, capacity, text.head_dim, x.dtype)
    out = talker.prefill(x, jnp.asarray(prompt.position_ids), empty)
    length, budget = jnp.asarray(prompt.length), jnp.asarray(request.budget)
    rows = Rows(
        token=jnp.zeros((B,), jnp.int32),
        done=budget <= 0,
        remaining=budget,
        seen=jnp.zeros((B, text.vocab_size if plan.first.penalised else 0), bool),
        keys=request.keys,
    )
    state = SpeechState(
        cache=replace(out.cache, length=length),
        hidden=jnp.take_along_axis(out.hidden, length[:, None, None] - 1, axis=1)[:, 0],
        frames=jnp.zeros((B,), jnp.int32),
        rope_delta=jnp.asarray(prompt.rope_delta),
        rows=rows,
    )
    drawn = _draw(talker, state, jnp.ones((B,), bool), values.first, plan.first)
    return lay_over(drawn, declaration.mesh)


def prompt_inputs(talker: Talker, embed: jax.Array, prompt: SpeechPrompt, hidden: jax.Array | None) -> jax.Array:
    """The columns of the prompt, [B, U, D]: text, or what the Thinker made of media, plus a codec mark where one is.

    embed [V, D] and hidden [B, T, D] as in `prefill_talker`.
    """
    x = talker.text_projection(embed[prompt.text_ids])
    if hidden is not None:
        index = jnp.asarray(prompt.hidden_index)[..., None]
        heard = jnp.take_along_axis(hidden, jnp.maximum(index, 0), axis=1)
        x = jnp.where(index >= 0, talker.hidden_projection(heard), x)
    codec = jnp.asarray(prompt.codec_ids)
    return x + jnp.where(codec[..., None] >= 0, talker.embed_codes(jnp.maximum(codec, 0)), 0)


@partial(
    jax.jit,
    static_argnames=("declaration", "plan", "unroll"),
    donate_argnames="state",
    compiler_options=LOOP_OPTIONS,
)
def decode_frames(
    params: dict,
    embed: jax.Array,
    state: SpeechState,
    text_ids: Array,
    frames: Array,
    values: SpeechValues,
    *,
    declaration: Declaration,
    plan: SpeechPlan,
    unroll: int | None = None,
) -> tuple[Frames, SpeechState]:
    """Make up to frames[b] frames of each row b: the frames, and the state to go on from (`state` is donated).

    text_ids int32 [B, N]: what each reply says next, one token a frame. frames: int32 [B], at most N. A row that has
    made its frames pauses: nothing of it changes until a later chunk. The cache must hold as many more columns of a row
    as frames are made of it, and one more if it pauses then: while others go on, it writes into the column after those
    that it keeps. embed [V, D]: the Thinker's token embeddings.
    """
    talker: Talker = bind(declaration, params)
    text = talker.text_projection(embed[text_ids])
    B, N = text_ids.shape
    codes = jnp.full((B, talker.config.num_code_groups, N), NO_CODE, jnp.int32)

    def speaks(loop: Loop) -> jax.Array:
        return (loop.step < frames) & ~loop.state.rows.done

    def going(loop: Loop) -> jax.Array:
        return (loop.step < N) & jnp.any(speaks(loop))

    def step(loop: Loop) -> Loop:
        active, state = speaks(loop), loop.state
        first = talker.embed_codes(state.rows.token)
        frame, x = _frame(talker.code_predictor, first, state, values.residual, plan.residual)
        frame = jnp.where(active[:, None], frame, NO_CODE)
        codes = jax.lax.dynamic_update_slice(loop.codes, frame[..., None], (0, 0, loop.step))
        remaining = state.rows.remaining - active
        rows = replace(state.rows, remaining=remaining, done=state.rows.done | (remaining <= 0))
        state = replace(state, rows=rows, frames=state.frames + active)
        x = x + jax.lax.dynamic_index_in_dim(text, loop.step, axis=1, keepdims=False)
        active = active & ~rows.done
        state = _listen(talker, x.astype(text.dtype), state, active, unroll)
        return Loop(loop.step + 1, _draw(talker, state, active, values.first, plan.first), codes)

    loop = jax.lax.while_loop(going, step, Loop(jnp.int32(0), state, codes))
    mesh = declaration.mesh
    return Frames(replicate(loop.codes, mesh), replicate(loop.state.rows.done, mesh)), lay_over(loop.state, mesh)


def grow(state: SpeechState, *, capacity: int) -> SpeechState:
    """The same state with a cache of at least `capacity` columns; the argument must not be used afterwards."""
    return replace(state, cache=state.cache.grow(capacity))


def _listen(talker: Talker, x: jax.Array, state: SpeechState, active: jax.Array, unroll: int | None) -> SpeechState:
    """Run one input [B, D] per row through the Talker; only rows that are `active` (bool [B]) move on."""
    position = state.cache.length + state.rope_delta
    position = jnp.broadcast_to(position[None, :, None], (3, position.shape[0], 1))
    out = talker.extend(x[:, None], position, state.cache, unroll=unroll)
    cache = replace(out.cache, length=jnp.where(active, out.cache.length, state.cache.length))
    return replace(state, hidden=jnp.where(active[:, None], out.hidden[:, 0], state.hidden), cache=cache)


def _draw(talker: Talker, state: SpeechState, active: jax.Array, values: dict, plan: Plan) -> SpeechState:
    """Draw the first code of the next frame of the rows that are `active` (bool [B]).

    The end mark ends a row without a frame.
    """
    config, rows = talker.config, state.rows
    V = config.text.vocab_size
    ids = jnp.arange(V)
    mark = (ids >= V - CODEC_MARKS) & (ids != config.codec_eos_id)
    logits = jnp.where(mark, -jnp.inf, talker.logits(state.hidden))
    code = sample(logits, rows.keys, state.frames * config.num_code_groups, rows.seen, values, plan)
    seen = rows.seen
    if plan.penalised:
        # A row that pauses writes after the end of its vocabulary, where nothing is.
        seen = seen.at[jnp.arange(code.shape[0]), jnp.where(active, code, V)].set(True, mode="drop")
    done = rows.done | (active & (code == config.codec_eos_id))
    token = jnp.where(done, 0, jnp.where(active, code, rows.token))
    return replace(state, rows=replace(rows, token=token, done=done, seen=seen))


def _frame(
    predictor: CodePredictor, first: jax.Array, state: SpeechState, values: dict, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """The codes int32 [B, Q] of the frame that the rows' tokens open (embedded: `first` [B, D]), and their sum.

    The sum float32 [B, D] is of the codes' embeddings: many small numbers, each of which half precision would round.
    """
    config = predictor.config
    B, Q = first.shape[0], predictor.embed.shape[0] + 1
    cache = KVCache.empty(config.num_layers, B, config.num_kv_heads, Q, config.head_dim, first.dtype)
    opened = predictor.extend(jnp.stack([state.hidden, first], axis=1), cache)

    def draw(hidden: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
        code = sample(predictor.logits(hidden, i), state.rows.keys, state.frames * Q + i + 1, None, values, plan)
        return code, predictor.embed_code(code, i)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        hidden, cache, total = carry
        code, x = draw(hidden, i)
        out = predictor.extend(x[:, None], cache)
        return (out.hidden[:, 0], out.cache, total + x), code

    carry = (opened.hidden[:, -1], opened.cache, first.astype(jnp.float32))
    (hidden, _, total), codes = jax.lax.scan(step, carry, jnp.arange(Q - 2))
    last, x = draw(hidden, Q - 2)
    return jnp.concatenate([state.rows.token[:, None], codes.T, last[:, None]], axis=1), total + x
