"""DFlash against a statement of it in PyTorch, written from its description: no cache, one row at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.models.dflash import DFlash
from omni_jax.models.param import bind
from omni_jax.weights.drafters import load_drafter
from scripts.small.drafter import draft_config_dict
from tests.helpers.arrays import close
from tests.models.statements import BlockStatement

VARIANTS = ("tiny", "small", "odd")
B, SLOTS = 3, 48
# Tokens of each row that are real: of the prompt, then of each round.
COUNTS = ((9, 5, 1), (3, 1, 6), (1, 6, 2), (6, 6, 6), (2, 1, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_equal_the_statement(variant: str, drafters: Callable[[str, str], Path]) -> None:
    torch.set_num_threads(1)
    directory, config = drafters("dflash", variant), draft_config_dict(variant, "dflash")
    drafter = load_drafter(directory)
    module, W = drafter.module, drafter.config.block_size
    assert isinstance(module, DFlash)
    rows = [BlockStatement(directory, config) for _ in range(B)]
    rng, D = np.random.default_rng(5), config["hidden_size"]
    width = module.fc.weight.shape[1]

    @partial(jax.jit, donate_argnums=1)
    def step(params: dict, cache: Any, features: Any, count: Any, block: Any) -> tuple:
        module = bind(drafter.declaration, params)
        context = module.fuse(features)
        cache = module.remember(cache, context, count)
        return *module.draft(block, cache), context

    cache = module.empty(B, SLOTS, jnp.float32)
    for count in COUNTS:
        T = max(*count, W)
        features = rng.standard_normal((B, T, width)).astype(np.float32)
        # What is not real may be anything.
        features[np.arange(T) >= np.asarray(count)[:, None]] *= 100
        block = 0.7 * rng.standard_normal((B, W, D)).astype(np.float32)
        hidden, cache, context = step(drafter.params, cache, features, jnp.asarray(count), block)
        for b, row in enumerate(rows):
            row.remember(torch.tensor(features[b, : count[b]]))
            close(context[b, : count[b]], row.context[-count[b] :])
            close(hidden[b], row.draft(torch.tensor(block[b])))
    assert cache.length.tolist() == [len(row.context) for row in rows] == [21, 19, 19]
    for b, row in enumerate(rows):
        for i in range(row.layers):
            k, v = row.keys_values(row.context, i, 0)
            close(cache.k[i, b, :, : len(k)].swapaxes(0, 1), k)
            close(cache.v[i, b, :, : len(v)].swapaxes(0, 1), v)


@pytest.mark.parametrize("variant", ["odd"])
def test_a_row_alone_equals_the_batch(variant: str, drafters: Callable[[str, str], Path]) -> None:
    drafter = load_drafter(drafters("dflash", variant))
    module, W = drafter.module, drafter.config.block_size
    assert isinstance(module, DFlash)
    rng, D = np.random.default_rng(6), module.fc.weight.shape[0]
    features = jnp.asarray(rng.standard_normal((B, 11, module.fc.weight.shape[1])), jnp.float32)
    block = jnp.asarray(rng.standard_normal((B, W, D)), jnp.float32)
    count = jnp.asarray([11, 4, 7])

    def run(rows: slice) -> jax.Array:
        cache = module.empty(len(count[rows]), SLOTS, jnp.float32)
        return module.draft(block[rows], module.remember(cache, module.fuse(features[rows]), count[rows]))[0]

    together = run(slice(None))
    for b in range(B):
        close(run(slice(b, b + 1)), together[b : b + 1])
