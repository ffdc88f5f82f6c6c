"""How fast is the device, what do our kernels reach on it, and where does a decode step's time go?

Weights are random and made on the device; times are wall clock around `block_until_ready`, the median of some
repetitions after one that compiles.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import CHUNK, DecodeState, PrefillInput, decode_chunk, grow, prefill
from omni_jax.models.param import Declaration, declare, init_params, project
from omni_jax.models.thinker import Thinker
from omni_jax.ops import moe
from omni_jax.ops.cache import capacity_for
from scripts.gpu.correct import text_request
from scripts.small.configs import config_dict

TOP_KERNELS = 25


@dataclass(frozen=True)
class Timing:
    """One measurement: milliseconds (median), seconds of the first call, and the rate that follows."""

    name: str
    milliseconds: float
    first_seconds: float
    rate: float = 0.0
    unit: str = ""


def measure(name: str, run: Callable[[], Any], repetitions: int, work: float = 0.0, unit: str = "") -> Timing:
    """Time `run`; the rate is `work` per second."""
    times = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    return Timing(name, 1e3 * seconds, times[0], work / seconds if work else 0.0, unit)


def repeated(function: Callable[..., jax.Array], turns: int) -> Callable[..., jax.Array]:
    """Run x = function(x, ...) `turns` times in one program, so that short kernels are not hidden by the launch."""

    def loop(x: jax.Array, *args: Any) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: function(x, *args).astype(x.dtype), x)

    return jax.jit(loop)


def bandwidth(gigabytes: float) -> list[Timing]:
    """Reading and writing an array."""
    x = jnp.zeros(int(gigabytes * 1e9 / 4), jnp.float32)
    return [measure("copy", partial(jax.jit(lambda x: x + 1), x), 10, 2 * x.nbytes / 1e9, "GB/s")]


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
            timings.append(measure(f"1 x {D} by {name}, {N} outputs", run, 10, work, "GB/s"))
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
                    x: jax.Array, ids: jax.Array, w: jax.Array, gate_up: jax.Array, down: jax.Array, run: Any = backend
                ) -> jax.Array:
                    return x + run(x, ids, w, gate_up, down, 0)

                run = partial(repeated(layer, turns), x, ids, weights, gate_up, down)
                timings.append(measure(f"experts {name}, {R} rows", run, 3, turns * R, "rows/s"))
    return timings


@dataclass(frozen=True)
class Model:
    """Random parameters of a whole Thinker on the device."""

    config: ThinkerConfig
    declaration: Declaration
    params: dict

    def request(self, rows: int, tokens: int, new: int) -> PrefillInput:
        prompts = np.random.default_rng(0).integers(0, 200, (rows, tokens)).astype(np.int32)
        return jax.device_put(text_request(prompts, new))

    def prefill(self, request: PrefillInput, capacity: int) -> tuple[jax.Array, DecodeState]:
        plan = Sampling().plan(self.config.text.vocab_size)
        return prefill(self.params, request, None, declaration=self.declaration, plan=plan, capacity=capacity)[:2]

    def decode(self, request: PrefillInput, state: DecodeState, unroll: int) -> tuple[jax.Array, DecodeState]:
        plan, steps = Sampling().plan(self.config.text.vocab_size), np.int32(CHUNK)
        return decode_chunk(
            self.params,
            state,
            steps,
            request.stop_ids,
            request.values,
            declaration=self.declaration,
            plan=plan,
            unroll=unroll,
        )


def make_model(shape: str, dtype: str) -> Model:
    """A Thinker of configuration `shape`."""
    config = OmniConfig.from_hf(config_dict(shape)).thinker
    params = init_params(Thinker, config, dtype=jnp.dtype(dtype))
    return Model(config, declare(Thinker, config), jax.block_until_ready(params))


def prefills(model: Model, lengths: tuple[int, ...]) -> list[Timing]:
    """Prompts of one row, to the first token."""
    timings = []
    for tokens in lengths:
        run = partial(model.prefill, model.request(1, tokens, 1), capacity_for(tokens))
        timings.append(measure(f"prefill 1 x {tokens}", run, 5, tokens, "tokens/s"))
    return timings


def decodes(model: Model, rows: int, capacity: int, unroll: int, repetitions: int = 3) -> Timing:
    """Chunks of decode after prompts of 128 tokens, in a cache of `capacity` capacity."""
    request = model.request(rows, 128, CHUNK * (repetitions + 1) + 1)
    _, state = model.prefill(request, capacity_for(128))
    state = grow(state, capacity=capacity)

    def run() -> jax.Array:
        nonlocal state
        tokens, state = model.decode(request, state, unroll)
        return tokens

    form = "scan" if unroll == 1 else f"unroll {unroll}"
    timing = measure(f"decode {rows} rows, {capacity} capacity, {form}", run, repetitions, rows * CHUNK, "tokens/s")
    assert int(state.rows.remaining.max()) == 0, "rows ended early: the rate would be wrong"
    return timing


def kernel_times(model: Model, rows: int, capacity: int, unroll: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and calls of the kernels that take most time in one chunk of decoding."""
    request = model.request(rows, 128, 2 * CHUNK + 1)
    _, state = model.prefill(request, capacity_for(128))
    _, state = model.decode(request, grow(state, capacity=capacity), unroll)
    return profiled(partial(model.decode, request, jax.block_until_ready(state), unroll))


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
