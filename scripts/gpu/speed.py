"""How fast is the device, what do our kernels reach on it, and where does a decode step's time go?

Weights are random and made on the device. The programs are those that users run: layers per turn of the loop, kernels
and options are the project's own choice. Caches are as full as they get, so that what stops at a row's length is not
measured on short rows.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Plan, Sampling
from omni_jax.decode.text import CHUNK, DecodeState, PrefillInput, Rows, decode_chunk, prefill, read_piece
from omni_jax.decoder_config import DecoderConfig
from omni_jax.models.param import Declaration, declare, init_params, project
from omni_jax.models.thinker import Thinker
from omni_jax.ops import moe
from omni_jax.ops.cache import KVCache, capacity_for
from omni_jax.quantization import stating
from scripts.bench.system import require
from scripts.gpu.correct import text_request
from scripts.gpu.sizes import GOALS, decode_name, piece_name, prefill_name
from scripts.gpu.steps import Fact, Profile
from scripts.gpu.timing import Case, Timing, measure, measure_judged, share_of
from scripts.small.configs import config_dict

TOP_KERNELS = 25


def repeated(function: Callable[..., jax.Array], turns: int) -> Callable[..., jax.Array]:
    """Run x = function(x, ...) `turns` times in one program, x [...], so that launches do not hide short kernels."""

    def loop(x: jax.Array, *args: Any) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: function(x, *args).astype(x.dtype), x)

    return jax.jit(loop)


def bandwidth(gigabytes: float) -> list[Timing]:
    """Reading and writing an array."""
    x = jnp.zeros(int(gigabytes * 1e9 / 4), jnp.float32)
    return [measure(Case("copy", 1, 2 * x.nbytes / 1e9, "GB/s"), partial(jax.jit(lambda x: x + 1), x))]


def one_row_products(config: ThinkerConfig, turns: int = 20) -> list[Timing]:
    """One row times a matrix as stored, [out, in], and transposed: bfloat16, gigabytes of weight per second."""
    D = config.text.hidden_size
    timings = []
    for N in (D, 4 * D):
        x, stored = jnp.ones((1, D), jnp.bfloat16), jnp.zeros((N, D), jnp.bfloat16)
        work = turns * stored.nbytes / 1e9

        def by_rows(x: jax.Array, w: jax.Array) -> jax.Array:
            return x + project(x, w)[:, : x.shape[1]]

        def by_columns(x: jax.Array, w: jax.Array) -> jax.Array:
            return x + jnp.dot(x, w, preferred_element_type=jnp.float32)[:, : x.shape[1]]

        for name, function, w in (("[out, in]", by_rows, stored), ("[in, out]", by_columns, stored.T.copy())):
            run = partial(repeated(function, turns), x, w)
            timings.append(measure(Case(f"1 x {D} by {name}, {N} outputs", 1, work, "GB/s"), run))
    return timings


def expert_backends(config: ThinkerConfig, rows: tuple[int, ...], turns: int = 10) -> list[Timing]:
    """One layer of experts by every backend that can run it: bfloat16, rows per second."""
    text = config.text
    E, D, F, A = text.num_experts, text.hidden_size, text.moe_intermediate_size, text.experts_per_token
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up = jax.jit(lambda k: (D**-0.5 * jax.random.normal(k, (1, E, D, 2, F))).astype(jnp.bfloat16))(keys[0])
    down = jax.jit(lambda k: (F**-0.5 * jax.random.normal(k, (1, E, F, D))).astype(jnp.bfloat16))(keys[1])
    backends: dict[str, tuple[Any, int]] = {"gathered": (moe.gathered, 16), "tiled": (moe.tiled, max(rows))}
    if find_spec("tokamax") and jax.default_backend() == "gpu":
        backends["grouped"] = (moe.grouped, max(rows))
    timings = []
    for R in rows:
        x = jax.random.normal(keys[2], (R, D), jnp.bfloat16)
        ids = jnp.asarray(np.argsort(np.random.default_rng(R).random((R, E)), axis=1)[:, :A], jnp.int32)
        weights = jnp.full((R, A), 1 / A, jnp.bfloat16)
        for name, (backend, most) in backends.items():
            if R <= most:

                def layer(
                    x: jax.Array, routing: moe.Routing, gate_up: jax.Array, down: jax.Array, run: Any = backend
                ) -> jax.Array:
                    return x + run(x, routing, moe.ExpertWeights(gate_up, down, 0))

                run = partial(repeated(layer, turns), x, moe.Routing(ids, weights), gate_up, down)
                timings.append(measure(Case(f"experts {name}, {R} rows", turns, R, "rows/s"), run))
    return timings


@dataclass(frozen=True)
class Model:
    """Random parameters of a whole Thinker on the device."""

    config: ThinkerConfig
    declaration: Declaration
    params: dict

    def request(self, rows: int, tokens: int, new: int) -> PrefillInput:
        """A request for `new` tokens after each of some prompts of `tokens` tokens."""
        prompts = np.random.default_rng(0).integers(0, 200, (rows, tokens)).astype(np.int32)
        return jax.device_put(text_request(prompts, new))

    def prefill(self, request: PrefillInput, capacity: int, program: Any = prefill) -> Any:
        """The first tokens int32 [B], and the state to decode from; or what else `program` makes of prefill's own."""
        static = {"declaration": self.declaration, "plan": self.plan, "capacity": capacity}
        return program(self.params, request, None, **static)

    def decode(self, state: DecodeState, program: Any = decode_chunk) -> Any:
        """The tokens int32 [B, CHUNK] of one chunk, and the state after it; or as in `prefill`."""
        stop_ids, values = np.zeros(0, np.int32), Sampling().values()
        static = {"declaration": self.declaration, "plan": self.plan}
        return program(self.params, state, np.int32(CHUNK), stop_ids, values, **static)

    @property
    def plan(self) -> Plan:
        """The static part of greedy decoding."""
        return Sampling().plan(self.config.text.vocab_size)

    def standing(self, rows: int, capacity: int, new: int) -> DecodeState:
        """A state with room for just `new` more tokens in every row, as if long prompts had been read."""
        return DecodeState(
            full_cache(self.config.text, rows, capacity, new, self.params["embed"].dtype),
            jnp.zeros((rows,), jnp.float32),
            rows_to_go(rows, new),
        )


def full_cache(layers: DecoderConfig, rows: int, capacity: int, new: int, dtype: Any) -> KVCache:
    """A cache of these layers in which every row holds all but `new` of its tokens: noise, the same in all layers."""
    shape = layers.num_layers, rows, layers.num_kv_heads, capacity, layers.head_dim

    @partial(jax.jit, static_argnames="seed")
    def noise(seed: int) -> jax.Array:
        one = jax.random.normal(jax.random.key(seed), (1, 1, *shape[2:]), jnp.dtype(dtype))
        return jnp.broadcast_to(one, shape)

    return KVCache(noise(0), noise(1), jnp.full((rows,), capacity - new, jnp.int32))


def rows_to_go(rows: int, new: int, seen: int = 0) -> Rows:
    """Rows that may draw `new` tokens more; seen: the size of a vocabulary whose tokens count once drawn."""
    return Rows(
        token=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        remaining=jnp.full((rows,), new, jnp.int32),
        seen=jnp.zeros((rows, seen), bool),
        keys=row_keys(0, rows),
    )


def make_model(shape: str, dtype: str, quantize: str | None = None) -> Model:
    """A Thinker of configuration `shape`; quantize: "int8" for its experts in eight bits."""
    config = OmniConfig.from_hf(stating(config_dict(shape), quantize)).thinker
    params = init_params(Thinker, config, dtype=jnp.dtype(dtype))
    return Model(config, declare(Thinker, config), jax.block_until_ready(params))


def weights_in_memory(model: Model) -> list[Fact]:
    """Gigabytes of the Thinker's weights, and of everything on the device."""
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    memory = jax.devices()[0].memory_stats() or {}
    used = f"{memory['bytes_in_use'] / 1e9:.1f}" if "bytes_in_use" in memory else "unknown"
    return [Fact("Thinker's weights, GB", f"{held / 1e9:.1f}"), Fact("in use on the device, GB", used)]


def prefills(model: Model, tokens: int) -> list[Timing]:
    """A prompt of one row, to the first token."""
    request, capacity = model.request(1, tokens, 1), capacity_for(tokens)
    name, share = prefill_name(tokens), share_of(model.config.text, tokens)
    case = Case(name, 1, tokens, "tokens/s", GOALS.get(name, ""), share)
    lower = partial(model.prefill, request, capacity, prefill.lower)
    return [measure_judged(case, lower, lambda: model.prefill(request, capacity)[0])]


def pieces(model: Model, tokens: int, held: int) -> list[Timing]:
    """A piece of a prompt of one row, after a cache that holds `held` tokens of it."""
    text, capacity = model.config.text, capacity_for(held + tokens)
    cache = full_cache(text, 1, capacity, capacity - held, model.params["embed"].dtype)
    token_ids, positions = jnp.zeros((1, tokens), jnp.int32), jnp.full((3, 1, tokens), float(held))

    def read(program: Any) -> Any:
        return program(model.params, token_ids, positions, None, cache, declaration=model.declaration)

    def again() -> jax.Array:
        nonlocal cache
        longer, _ = read(read_piece)
        cache = replace(longer, length=longer.length - tokens)
        return longer.length

    case = Case(piece_name(tokens, held), 1, tokens, "tokens/s", share=share_of(text, tokens))
    return [measure_judged(case, partial(read, read_piece.lower), again)]


def decodes(model: Model, rows: int, slots: int, mark: str = "") -> list[Timing]:
    """Steps of decoding with a cache of `slots` slots; mark: what the name says besides."""
    name = decode_name(rows, slots)
    case = Case(name + mark, CHUNK, rows, "tokens/s", GOALS.get(name, ""), share_of(model.config.text, rows))
    state = model.standing(rows, slots, CHUNK * (case.repetitions + 1))
    lower = partial(model.decode, state, decode_chunk.lower)

    def run() -> jax.Array:
        nonlocal state
        tokens, state = model.decode(state)
        return tokens

    timing = measure_judged(case, lower, run)
    require("tokens that rows may still draw", int(state.rows.remaining.max()), 0)
    return [timing]


def decode_profile(model: Model, rows: int, slots: int) -> list[Profile]:
    """The kernels that take most time in one chunk of decoding."""
    _, state = model.decode(model.standing(rows, slots, 2 * CHUNK))
    title = f"{CHUNK} steps of {decode_name(rows, slots)}"
    return [Profile(title, profiled(partial(model.decode, jax.block_until_ready(state))))]


def profiled(run: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """Name, milliseconds and calls of the kernels that take most time in `run`, which is compiled already."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(files[0])).planes)
        return busiest([p for p in planes if p.name.startswith("/device:")] or planes)


def busiest(planes: list[Any]) -> list[tuple[str, float, int]]:
    """The profile's events by their total time; on a device, those of its streams."""
    nanoseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in planes:
        lines = list(plane.lines)
        for line in [x for x in lines if x.name.startswith("Stream")] or lines:
            # Names with a dollar sign are Python's own calls, which a host's profile holds too.
            for event in (e for e in line.events if not e.name.startswith("$")):
                nanoseconds[event.name] += int(event.duration_ns)
                calls[event.name] += 1
    return [(name, total / 1e6, calls[name]) for name, total in nanoseconds.most_common(TOP_KERNELS)]
