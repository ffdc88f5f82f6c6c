"""The programs that `aot_report.py` compiles: the real entry points, lowered with shapes alone.

So the full 30B-A3B model needs neither its weights nor memory for them. Arrays are placed on an H200 that exists as a
description only, `h200_target_config.textproto`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny_configs import config_dict

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.decode.frames import TalkerPrompt, begin, speak
from omni_jax.decode.generate import DecodeState, Request, Rows, decode_chunk, prefill
from omni_jax.decode.media import encode_audio, encode_vision
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech import FRAMES, Voice
from omni_jax.decode.vocode import start, vocode_chunk
from omni_jax.models.param import Graph, declare, init_params
from omni_jax.omni import PARTS
from omni_jax.ops.cache import KVCache, slots_for

DESCRIPTION = Path(__file__).resolve().parent / "h200_target_config.textproto"


@dataclass(frozen=True)
class Target:
    """What a program is lowered for: the model, and arrays that exist in shape only, on the described GPU."""

    config: OmniConfig
    graphs: dict[str, Graph]
    device: Any
    sharding: NamedSharding
    dtype: Any

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def params(self, part: str) -> dict:
        return jax.tree.map(lambda p: self.array(*p.shape, dtype=self.dtype), self.graphs[part].shapes)

    def keys(self, rows: int) -> Any:
        return self.array(rows, dtype=jax.random.key(0).dtype)

    def values(self) -> dict:
        return {name: self.array() for name in Sampling().values()}

    def result(self, function: Callable[..., Any], *args: Any) -> Any:
        """The shapes that a function returns, as arrays of this target."""
        return jax.tree.map(lambda a: self.array(*a.shape, dtype=a.dtype), jax.eval_shape(function, *args))


@dataclass(frozen=True)
class Program:
    """A program's name, the part it runs, whether it has experts, its cache as (rows, slots), and how it is lowered."""

    name: str
    part: str
    routed: bool
    cache: tuple[int, int] | None
    lower: Callable[[], Any]


def h200(shape: str, dtype: Any) -> Target:
    """One H200 as the compiler sees it, and the model of configuration `shape`."""
    topology: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=DESCRIPTION.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    mesh = Mesh(mesh.devices, ("data",), axis_types=(AxisType.Auto,))
    config = OmniConfig.from_hf(config_dict(shape))
    graphs = {part: declare(module, getattr(config, part)) for part, module in PARTS.items()}
    return Target(config, graphs, topology.devices[0], NamedSharding(mesh, PartitionSpec()), jnp.dtype(dtype))


def programs(target: Target) -> Iterator[Program]:
    """Every program reported."""
    yield from _text_programs(target)
    yield from _media_programs(target)
    yield from _speech_programs(target)


def _text_programs(target: Target) -> Iterator[Program]:
    text = target.config.thinker.text
    for tokens in (512, 4096, 8192):
        lower = partial(lower_prefill, target, 1, tokens)
        yield Program(f"prefill 1x{tokens}", "thinker", True, (1, slots_for(tokens)), lower)
    for rows, slots in ((1, 2048), (8, 2048), (32, 4096)):
        for form, unroll in (("scan", 1), ("unroll", text.num_layers)):
            lower = partial(lower_decode, target, rows, slots, unroll)
            yield Program(f"decode {rows}, {slots} slots, {form}", "thinker", True, (rows, slots), lower)


def _media_programs(target: Target) -> Iterator[Program]:
    for patches in (1024, 4096):
        lower = partial(lower_vision, target, 1, patches)
        yield Program(f"vision 1 frame, {patches} patches", "thinker", False, None, lower)
    yield Program("random weights", "thinker", False, None, partial(lower_init, target))
    yield Program("audio 4 windows", "thinker", False, None, partial(lower_audio, target, 4))


def _speech_programs(target: Target) -> Iterator[Program]:
    text = _talker_text(target)
    for rows in (1, 8):
        lower = partial(lower_begin, target, rows, 512)
        yield Program(f"speech prompt {rows}x512", "talker", True, (rows, slots_for(512)), lower)
    for rows in (1, 8):
        for form, unroll in (("scan", 1), ("unroll", text.num_layers)):
            lower = partial(lower_speak, target, rows, 1024, unroll)
            yield Program(f"speech frames {rows}, 1024 slots, {form}", "talker", True, (rows, 1024), lower)
    for rows, frames in ((1, 4), (1, 16), (1, 64), (8, 4), (8, 16)):
        lower = partial(lower_vocode, target, rows, frames)
        yield Program(f"speech sound {rows}x{frames}", "code2wav", False, None, lower)


def _talker_text(target: Target) -> DecoderConfig:
    assert target.config.talker is not None
    return target.config.talker.text


def lower_prefill(target: Target, rows: int, tokens: int) -> Any:
    """The prompt's program, [rows, tokens]."""
    i32 = jnp.int32
    request = Request(
        token_ids=target.array(rows, tokens, dtype=i32),
        length=target.array(rows, dtype=i32),
        position_ids=target.array(3, rows, tokens),
        rope_delta=target.array(rows),
        budget=target.array(rows, dtype=i32),
        keys=target.keys(rows),
        stop_ids=target.array(1, dtype=i32),
        values=target.values(),
    )
    plan, graph = Sampling().plan(target.config.thinker.text.vocab_size), target.graphs["thinker"]
    return prefill.lower(target.params("thinker"), request, None, graph=graph, plan=plan, slots=slots_for(tokens))


def lower_decode(target: Target, rows: int, slots: int, unroll: int) -> Any:
    """A chunk of decode steps for `rows` rows with `slots` cache slots."""
    text, i32 = target.config.thinker.text, jnp.int32
    kv = target.array(text.num_layers, rows, text.num_kv_heads, slots, text.head_dim, dtype=target.dtype)
    standing = Rows(
        token=target.array(rows, dtype=i32),
        done=target.array(rows, dtype=jnp.bool_),
        remaining=target.array(rows, dtype=i32),
        seen=target.array(rows, 0, dtype=jnp.bool_),
        keys=target.keys(rows),
    )
    state = DecodeState(KVCache(kv, kv, target.array(rows, dtype=i32)), target.array(rows), standing)
    steps, stop_ids = target.array(dtype=i32), target.array(1, dtype=i32)
    plan, graph = Sampling().plan(text.vocab_size), target.graphs["thinker"]
    return decode_chunk.lower(
        target.params("thinker"), state, steps, stop_ids, target.values(), graph=graph, plan=plan, unroll=unroll
    )


def lower_vision(target: Target, rows: int, patches: int) -> Any:
    """The vision encoder for `rows` frames."""
    shape = (rows, patches, target.config.thinker.vision.patch_dim)
    grid = target.array(rows, 2, dtype=jnp.int32)
    return encode_vision.lower(target.params("thinker"), target.array(*shape), grid, graph=target.graphs["thinker"])


def lower_audio(target: Target, windows: int) -> Any:
    """The audio encoder for `windows` full attention windows."""
    audio = target.config.thinker.audio
    counts = target.array(windows, audio.window_chunks, dtype=jnp.int32)
    mel = target.array(windows, audio.window_chunks, audio.mel_bins, audio.chunk_frames)
    return encode_audio.lower(target.params("thinker"), mel, counts, counts, graph=target.graphs["thinker"])


def lower_init(target: Target) -> Any:
    """Random weights, made on the device."""
    make = partial(init_params, PARTS["thinker"], target.config.thinker, dtype=target.dtype)
    return jax.jit(make, out_shardings=target.sharding).lower()


def _speech_settings(target: Target, rows: int, columns: int) -> tuple[Any, Any, tuple, TalkerPrompt]:
    """The Thinker's embeddings, the plan and values of drawing as users do, and a prompt [rows, columns]."""
    assert target.config.talker is not None
    i32, text = jnp.int32, target.config.thinker.text
    embed = target.array(text.vocab_size, text.hidden_size, dtype=target.dtype)
    voice = Voice("ethan", Sampling(0.9, 50, repetition_penalty=1.05), FRAMES)
    ids = target.array(rows, columns, dtype=i32)
    prompt = TalkerPrompt(
        text_ids=ids,
        hidden_index=ids,
        codec_ids=ids,
        position_ids=target.array(3, rows, columns),
        rope_delta=target.array(rows),
        length=target.array(rows, dtype=i32),
        budget=target.array(rows, dtype=i32),
        keys=target.keys(rows),
    )
    return embed, voice.plan(target.config.talker), (target.values(), target.values()), prompt


def lower_begin(target: Target, rows: int, columns: int) -> Any:
    """The Talker's prompt, [rows, columns], with media."""
    embed, plan, values, prompt = _speech_settings(target, rows, columns)
    hidden = target.array(rows, columns, target.config.thinker.text.hidden_size, dtype=target.dtype)
    graph, slots = target.graphs["talker"], slots_for(columns)
    return begin.lower(target.params("talker"), embed, prompt, hidden, values, graph=graph, plan=plan, slots=slots)


def lower_speak(target: Target, rows: int, slots: int, unroll: int) -> Any:
    """A chunk of whole frames for `rows` rows with `slots` cache slots."""
    embed, plan, values, prompt = _speech_settings(target, rows, 128)
    params, graph, i32 = target.params("talker"), target.graphs["talker"], jnp.int32
    state = target.result(partial(begin, graph=graph, plan=plan, slots=slots), params, embed, prompt, None, values)
    text_ids, frames = target.array(rows, FRAMES, dtype=i32), target.array(dtype=i32)
    return speak.lower(params, embed, state, text_ids, frames, values, graph=graph, plan=plan, unroll=unroll)


def lower_vocode(target: Target, rows: int, frames: int) -> Any:
    """A chunk of the vocoder, `frames` frames of `rows` rows."""
    assert target.config.code2wav is not None
    params, graph = target.params("code2wav"), target.graphs["code2wav"]
    state = target.result(partial(start, rows=rows, graph=graph), params)
    codes = target.array(rows, target.config.code2wav.num_quantizers, frames, dtype=jnp.int32)
    return vocode_chunk.lower(params, codes, state, target.array(dtype=jnp.int32), graph=graph)
