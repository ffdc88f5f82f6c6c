"""The programs that `report` compiles: the real entry points, lowered with shapes alone.

So the full 30B-A3B model needs neither its weights nor memory for them. Arrays are placed on H200s that exist as a
description only, `h200_target_config.textproto`; on several, they are laid out over a mesh as `load` does it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax.config import OmniConfig
from omni_jax.decode.draft.loop import SpeculativeState, decode_rounds
from omni_jax.decode.draft.plan import proposer_for
from omni_jax.decode.media import encode_audio, encode_vision
from omni_jax.decode.pieces import PIECE
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.talker_loop import FRAMES, SpeechValues, TalkerPrompt, decode_frames, prefill_talker
from omni_jax.decode.speech.vocode import start, vocode_chunk
from omni_jax.decode.speech.voice import speech_plan
from omni_jax.decode.text import DecodeState, PrefillInput, Rows, decode_chunk, prefill, read_piece
from omni_jax.draft_config import read_draft_config
from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.models.param import Declaration, declare, init_params, is_float
from omni_jax.omni import PARTS
from omni_jax.ops.cache import CACHE_AXES, KVCache, capacity_for, lay_over
from omni_jax.quantization import stating
from omni_jax.settings import Voice
from omni_jax.sharding import MESH_AXES, Axes, sharding_for
from omni_jax.weights.drafters import Drafter, declare_drafter
from scripts.small.configs import PUBLIC_DFLASH, config_dict

# How a reply is drawn where it is not greedy.
DRAWN = Sampling(temperature=1.0, top_k=50, top_p=0.9)
DESCRIPTION = Path(__file__).resolve().parent / "h200_target_config.textproto"


@dataclass(frozen=True)
class Target:
    """What a program is lowered for: the model, and arrays that exist in shape only, on the described GPUs."""

    config: OmniConfig
    declarations: dict[str, Declaration]
    device: Any
    mesh: Mesh
    dtype: Any

    def array(self, *shape: int, dtype: Any = jnp.float32, axes: Axes | None = None) -> Any:
        """An array with these logical axes; by default every device has it whole."""
        sharding = sharding_for(axes or (None,) * len(shape), shape, self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array [B, ...] whose rows are on the devices that compute them."""
        return self.array(*shape, dtype=dtype, axes=("batch", *[None] * (len(shape) - 1)))

    def params(self, part: str) -> dict:
        return self.laid_params(self.declarations[part])

    def laid_params(self, declaration: Declaration) -> dict:
        """The parameters of a declared module."""
        return jax.tree.map(
            lambda p, axes: self.array(*p.shape, dtype=self.dtype if is_float(p.dtype) else p.dtype, axes=axes),
            declaration.shapes,
            declaration.axes,
        )

    def cache(self, layers: int, rows: int, kv_heads: int, capacity: int, head_dim: int) -> KVCache:
        kv = self.array(layers, rows, kv_heads, capacity, head_dim, dtype=self.dtype, axes=CACHE_AXES)
        return KVCache(kv, kv, self.rows(rows), self.declarations["thinker"].mesh)

    def keys(self, rows: int) -> Any:
        return self.rows(rows, dtype=jax.random.key(0).dtype)

    def values(self) -> dict:
        return {name: self.array(dtype=value.dtype) for name, value in Sampling().values().items()}

    def result(self, function: Callable[..., Any], *args: Any) -> Any:
        """The shapes that a function returns, as arrays of this target: caches, and others by their rows."""

        def laid(x: Any) -> Any:
            if isinstance(x, KVCache):
                k = self.array(*x.k.shape, dtype=x.k.dtype, axes=CACHE_AXES)
                return KVCache(k, k, self.rows(*x.length.shape), x.mesh)
            return self.rows(*x.shape, dtype=x.dtype) if x.ndim else self.array(dtype=x.dtype)

        return jax.tree.map(laid, jax.eval_shape(function, *args), is_leaf=lambda x: isinstance(x, KVCache))


@dataclass(frozen=True)
class Program:
    """A program's name, the part it runs, how many rows choose experts, its cache as (rows, slots), how it is lowered.

    routed: 0 where there are no experts. tokens: how many tokens, or frames, one turn of it makes or reads.
    """

    name: str
    part: str
    routed: int
    cache: tuple[int, int] | None
    lower: Callable[[], Any]
    tokens: int = 1


def h200(shape: str, dtype: Any, sizes: dict[str, int] | None = None, quantize: str | None = None) -> Target:
    """H200s as the compiler sees them, a mesh of `sizes` or one alone, and the model of configuration `shape`.

    quantize: "int8" for its routed experts in eight bits.
    """
    layout = tuple((sizes or {}).get(axis, 1) for axis in MESH_AXES)
    name = f"1x1x{prod(layout)}"
    topology: Any = topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=DESCRIPTION.read_text(), topology=name
    )
    devices = np.array(topology.devices).reshape(layout)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    config = OmniConfig.from_hf(stating(config_dict(shape), quantize))
    used = mesh if prod(layout) > 1 else None
    declarations = {part: declare(module, getattr(config, part), mesh=used) for part, module in PARTS.items()}
    return Target(config, declarations, topology.devices[0], mesh, jnp.dtype(dtype))


def mesh_programs(target: Target) -> Iterator[Program]:
    """The programs reported for several devices: a prompt, a step, a drafted round and a frame of speech."""
    for rows, tokens in ((1, 4096), (8, 4096)):
        lower = partial(lower_prefill, target, rows, tokens)
        yield Program(
            f"prefill {rows}x{tokens}", "thinker", rows * tokens, (rows, capacity_for(tokens)), lower, rows * tokens
        )
    for rows, capacity in ((8, 4096), (64, 4096)):
        lower = partial(lower_decode, target, rows, capacity)
        yield Program(f"decode {rows}, {capacity} slots", "thinker", rows, (rows, capacity), lower, rows)
    for rows in (8, 64):
        lower = partial(lower_round, target, rows, 4096, 8)
        yield Program(f"verify {rows}x8, 4096 slots", "thinker", 8 * rows, (rows, 4096), lower, 8 * rows)
    lower = partial(lower_speak, target, 8, 1024)
    yield Program("speech frames 8, 1024 slots", "talker", 8, (8, 1024), lower, 8)


def programs(target: Target) -> Iterator[Program]:
    """Every program reported."""
    yield from _text_programs(target)
    yield from _media_programs(target)
    yield from _speech_programs(target)


def _text_programs(target: Target) -> Iterator[Program]:
    for tokens in (512, 4096, 8192, 32768):
        lower = partial(lower_prefill, target, 1, tokens)
        yield Program(f"prefill 1x{tokens}", "thinker", tokens, (1, capacity_for(tokens)), lower)
    held = 32768
    lower, capacity = partial(lower_piece, target, PIECE, held), capacity_for(held + PIECE)
    yield Program(f"piece 1x{PIECE} after {held}", "thinker", PIECE, (1, capacity), lower)
    for rows, capacity in ((1, 2048), (8, 2048), (32, 4096), (64, 4096)):
        lower = partial(lower_decode, target, rows, capacity)
        yield Program(f"decode {rows}, {capacity} slots", "thinker", rows, (rows, capacity), lower)
    lower = partial(lower_decode, target, 1, 2048, DRAWN)
    yield Program("decode 1, 2048 slots, drawn", "thinker", 1, (1, 2048), lower)
    for tokens in (4, 8, 16):
        lower = partial(lower_round, target, 1, 2048, tokens)
        yield Program(f"verify 1x{tokens}, 2048 slots", "thinker", tokens, (1, 2048), lower)


def _media_programs(target: Target) -> Iterator[Program]:
    for patches in (1024, 4096):
        lower = partial(lower_vision, target, 1, patches)
        yield Program(f"vision 1 frame, {patches} patches", "thinker", 0, None, lower)
    yield Program("random weights", "thinker", 0, None, partial(lower_init, target))
    yield Program("audio 4 windows", "thinker", 0, None, partial(lower_audio, target, 4))


def _speech_programs(target: Target) -> Iterator[Program]:
    for rows in (1, 8):
        lower = partial(lower_begin, target, rows, 512)
        yield Program(f"speech prompt {rows}x512", "talker", rows * 512, (rows, capacity_for(512)), lower)
    for rows in (1, 8):
        lower = partial(lower_speak, target, rows, 1024)
        yield Program(f"speech frames {rows}, 1024 slots", "talker", rows, (rows, 1024), lower)
    for rows, frames in ((1, 4), (1, 16), (1, 64), (8, 4), (8, 16)):
        lower = partial(lower_vocode, target, rows, frames)
        yield Program(f"speech sound {rows}x{frames}", "code2wav", 0, None, lower)


def lower_prefill(target: Target, rows: int, tokens: int) -> Any:
    """The prompt's program, [rows, tokens]."""
    request = PrefillInput(
        token_ids=target.rows(rows, tokens),
        length=target.rows(rows),
        position_ids=target.array(3, rows, tokens, axes=(None, "batch", None)),
        rope_delta=target.rows(rows, dtype=jnp.float32),
        budget=target.rows(rows),
        keys=target.keys(rows),
        stop_ids=target.array(1, dtype=jnp.int32),
        values=target.values(),
    )
    plan, declaration = Sampling().plan(target.config.thinker.text.vocab_size), target.declarations["thinker"]
    return prefill.lower(
        target.params("thinker"), request, None, declaration=declaration, plan=plan, capacity=capacity_for(tokens)
    )


def lower_piece(target: Target, tokens: int, held: int) -> Any:
    """A piece [1, tokens] of a long prompt, without media, after a cache that holds `held` tokens of it."""
    text = target.config.thinker.text
    cache = target.cache(text.num_layers, 1, text.num_kv_heads, capacity_for(held + tokens), text.head_dim)
    positions = target.array(3, 1, tokens, axes=(None, "batch", None))
    declaration = target.declarations["thinker"]
    return read_piece.lower(
        target.params("thinker"), target.rows(1, tokens), positions, None, cache, declaration=declaration
    )


def standing(target: Target, rows: int, capacity: int) -> DecodeState:
    """The state of `rows` rows with `capacity` cache slots."""
    text = target.config.thinker.text
    state = Rows(
        token=target.rows(rows),
        done=target.rows(rows, dtype=jnp.bool_),
        remaining=target.rows(rows),
        seen=target.rows(rows, 0, dtype=jnp.bool_),
        keys=target.keys(rows),
    )
    cache = target.cache(text.num_layers, rows, text.num_kv_heads, capacity, text.head_dim)
    return DecodeState(cache, target.rows(rows, dtype=jnp.float32), state)


def lower_decode(target: Target, rows: int, capacity: int, sampling: Sampling | None = None) -> Any:
    """A chunk of decode steps for `rows` rows with `capacity` cache slots, greedy by default."""
    steps, stop_ids = target.array(dtype=jnp.int32), target.array(1, dtype=jnp.int32)
    plan = (sampling or Sampling()).plan(target.config.thinker.text.vocab_size)
    declaration, state = target.declarations["thinker"], standing(target, rows, capacity)
    return decode_chunk.lower(
        target.params("thinker"),
        state,
        steps,
        stop_ids,
        target.values(),
        declaration=declaration,
        plan=plan,
    )


def lower_round(target: Target, rows: int, capacity: int, verify_tokens: int) -> Any:
    """Rounds that draft with the public DFlash drafter's shape and verify `verify_tokens` tokens."""
    config = read_draft_config(PUBLIC_DFLASH)
    declared = replace(declare_drafter(config)[1], mesh=target.declarations["thinker"].mesh)
    drafter = Drafter("dflash", config, declared, {}, PUBLIC_DFLASH, {})
    proposer = proposer_for(drafter, target.config.thinker.text.num_layers)
    params = (target.params("thinker"), target.laid_params(drafter.declaration))
    declaration, plan = target.declarations["thinker"], Sampling().plan(target.config.thinker.text.vocab_size)

    def memory(params: dict) -> Any:
        return lay_over(proposer.empty(params, rows, capacity, target.dtype), declaration.mesh)

    decoding, drafting = standing(target, rows, capacity), target.rows(rows, dtype=jnp.bool_)
    state = SpeculativeState(decoding, target.result(memory, params[1]), drafting)
    count, stop_ids = target.array(dtype=jnp.int32), target.array(1, dtype=jnp.int32)
    return decode_rounds.lower(
        params,
        state,
        count,
        stop_ids,
        target.values(),
        proposer=proposer,
        declaration=declaration,
        plan=plan,
        verify_tokens=verify_tokens,
    )


def lower_vision(target: Target, rows: int, patches: int) -> Any:
    """The vision encoder for `rows` frames."""
    shape = (rows, patches, target.config.thinker.vision.patch_dim)
    grid = target.array(rows, 2, dtype=jnp.int32)
    return encode_vision.lower(
        target.params("thinker"), target.array(*shape), grid, declaration=target.declarations["thinker"]
    )


def lower_audio(target: Target, windows: int) -> Any:
    """The audio encoder for `windows` full attention windows."""
    audio = target.config.thinker.audio
    counts = target.array(windows, audio.window_chunks, dtype=jnp.int32)
    mel = target.array(windows, audio.window_chunks, audio.mel_bins, audio.chunk_frames)
    return encode_audio.lower(target.params("thinker"), mel, counts, counts, declaration=target.declarations["thinker"])


def lower_init(target: Target) -> Any:
    """Random weights, made on the device."""
    make = partial(init_params, PARTS["thinker"], target.config.thinker, dtype=target.dtype)
    return jax.jit(make, out_shardings=NamedSharding(target.mesh, PartitionSpec())).lower()


def _speech_settings(target: Target, rows: int, columns: int) -> tuple[Any, Any, SpeechValues, TalkerPrompt]:
    """The Thinker's embeddings, the plan and values of drawing as users do, and a prompt [rows, columns]."""
    assert target.config.talker is not None
    text = target.config.thinker.text
    embed = target.array(text.vocab_size, text.hidden_size, dtype=target.dtype, axes=("vocab", "embed"))
    ids = target.rows(rows, columns)
    prompt = SpeechPrompt(
        text_ids=ids,
        hidden_index=ids,
        codec_ids=ids,
        position_ids=target.array(3, rows, columns, axes=(None, "batch", None)),
        rope_delta=target.rows(rows, dtype=jnp.float32),
        length=target.rows(rows),
    )
    values = SpeechValues(target.values(), target.values())
    plan = speech_plan(Voice(), target.config.talker)
    return embed, plan, values, TalkerPrompt(prompt, target.rows(rows), target.keys(rows))


def lower_begin(target: Target, rows: int, columns: int) -> Any:
    """The Talker's prompt, [rows, columns], with media."""
    embed, plan, values, prompt = _speech_settings(target, rows, columns)
    hidden = target.rows(rows, columns, target.config.thinker.text.hidden_size, dtype=target.dtype)
    declaration, capacity = target.declarations["talker"], capacity_for(columns)
    return prefill_talker.lower(
        target.params("talker"), embed, prompt, hidden, values, declaration=declaration, plan=plan, capacity=capacity
    )


def lower_speak(target: Target, rows: int, capacity: int) -> Any:
    """A chunk of whole frames for `rows` rows with `capacity` cache slots."""
    embed, plan, values, prompt = _speech_settings(target, rows, 128)
    params, declaration = target.params("talker"), target.declarations["talker"]
    state = target.result(
        partial(prefill_talker, declaration=declaration, plan=plan, capacity=capacity),
        params,
        embed,
        prompt,
        None,
        values,
    )
    text_ids, frames = target.rows(rows, FRAMES), target.rows(rows)
    return decode_frames.lower(params, embed, state, text_ids, frames, values, declaration=declaration, plan=plan)


def lower_vocode(target: Target, rows: int, frames: int) -> Any:
    """A chunk of the vocoder, `frames` frames of `rows` rows."""
    assert target.config.code2wav is not None
    params, declaration = target.params("code2wav"), target.declarations["code2wav"]
    state = target.result(partial(start, rows=rows, declaration=declaration), params)
    codes = target.array(rows, target.config.code2wav.num_quantizers, frames, dtype=jnp.int32)
    return vocode_chunk.lower(params, codes, state, target.array(dtype=jnp.int32), declaration=declaration)
