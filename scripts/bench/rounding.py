"""Measure how far rounded experts are from exact ones, at the widths of the public model.

Rows pass through the routed experts of one layer, by the product that many rows take here, and through the same in
float64, each row through as many as the model chooses. Rows are drawn from a normal distribution; weights too, and
from Student's t with four degrees of freedom, whose few large weights cost a scale per channel the most. An error is
the root mean square of the difference, in parts of that of the exact output.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decoder_config import DecoderConfig
from omni_jax.ops.moe import ExpertWeights, Routing, moe
from scripts.bench.compare import write_json
from scripts.bench.options import Rounding
from scripts.gpu.correct import in_int8, plain_moe, root_mean_square
from scripts.small.configs import config_dict

WAYS = {
    "bfloat16": ("bfloat16", False),
    "int8, rows in bfloat16": ("bfloat16", True),
    "int8, rows in float32": ("float32", True),
}
Figures = dict[str, float]


def report(options: Rounding) -> None:
    """Measure, print the table, and write the JSON if asked for."""
    config = OmniConfig.from_hf(config_dict(options.shape))
    assert config.talker is not None
    stacks = {"Thinker": config.thinker.text, "Talker": config.talker.text}
    found = {}
    print(f"{'experts of a layer':40}" + "".join(f"{way:>24}" for way in WAYS))
    for part, stack in stacks.items():
        for drawn in ("normal", "t"):
            name = f"{part} {stack.hidden_size} x {stack.moe_intermediate_size}, {drawn}"
            found[name] = errors(stack, drawn, options)
            print(f"{name:40}" + "".join(f"{found[name][way]:24.2%}" for way in WAYS))
    write_json(options.json, options, found)


def errors(stack: DecoderConfig, drawn: str, options: Rounding) -> Figures:
    """The error of each way for `options.rows` rows [R, D], with weights of this distribution."""
    rng, (R, E) = np.random.default_rng(0), (options.rows, options.experts)
    D, F, A = stack.hidden_size, stack.moe_intermediate_size, min(stack.experts_per_token, options.experts)
    draw = rng.standard_normal if drawn == "normal" else partial(rng.standard_t, 4)
    gate_up, down = (np.asarray(draw(size=s), np.float32) * s[-1] ** -0.5 for s in ((E, 2, F, D), (E, D, F)))
    rows, counts = rng.standard_normal((R, D)), rng.dirichlet(np.ones(A), R)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(R)]).astype(np.int32)
    exact = plain_moe(ids, rows, counts, np.moveaxis(gate_up, -1, 1), down.swapaxes(1, 2))
    found = {}
    for way, (dtype, small) in WAYS.items():
        first, second = as_they_are(gate_up, down, dtype)
        if small:
            # Scales are those of a bfloat16 checkpoint.
            first, second = in_int8(gate_up[None], "bfloat16"), in_int8(down[None], "bfloat16")
        routing = Routing(jnp.asarray(ids), jnp.asarray(counts, dtype))
        got = jax.jit(moe)(jnp.asarray(rows, dtype), routing, ExpertWeights(first, second, 0))
        found[way] = root_mean_square(way, got, exact, 0.0).error
    return found


def as_they_are(gate_up: np.ndarray, down: np.ndarray, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Experts gate_up [E, 2, F, D] and down [E, D, F] as a model of one layer holds them, in `dtype`."""
    return jnp.asarray(np.moveaxis(gate_up, -1, 1)[None], dtype), jnp.asarray(down.swapaxes(1, 2)[None], dtype)
