"""EAGLE-3 against a statement of it in PyTorch, written from its description: no cache, one row at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from omni_jax.models.eagle3 import Eagle3
from omni_jax.ops.attention import tree_mask
from omni_jax.ops.cache import KVCache
from omni_jax.weights.drafters import load_drafter
from scripts.small.drafter import draft_config_dict
from tests.helpers.arrays import close
from tests.models.statements import StepStatement

VARIANTS = ("tiny", "small", "odd")
B, SLOTS = 3, 40


class Both:
    """The module and a statement per row, given the same: pairs of features and next tokens, count by row."""

    def __init__(self, directory: Path, config: dict):
        torch.set_num_threads(1)
        module = load_drafter(directory).module
        assert isinstance(module, Eagle3)
        self.module, self.rng = module, np.random.default_rng(7)
        self.rows = [StepStatement(directory, config) for _ in range(B)]
        self.D, self.width = module.fc.weight.shape
        table = 0.7 * self.rng.standard_normal((config["vocab_size"], self.D)).astype(np.float32)
        self.table = self.rows[0].w.get("embed_tokens.weight", torch.tensor(table)).numpy()
        self.extend = jax.jit(module.extend)
        self.cache: KVCache = module.empty(B, SLOTS, jnp.float32)
        self.target_table = jnp.asarray(table)

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, len(self.table), shape)

    def embed(self, tokens: Any) -> jax.Array:
        return self.module.embed_tokens(jnp.asarray(tokens), self.target_table)

    def commit(self, count: tuple[int, ...]) -> jax.Array:
        """Pairs that the Thinker has confirmed -> the last output of each row [B, D]."""
        T = max(count) + 1
        features, tokens = self.rng.standard_normal((B, T, self.width)).astype(np.float32), self.tokens(B, T)
        features[np.arange(T) >= np.asarray(count)[:, None]] *= 100
        fused = self.module.fuse(jnp.asarray(features))
        out, self.cache = self.extend(fused, self.embed(tokens), self.cache, jnp.asarray(count))
        for b, row in enumerate(self.rows):
            for t in range(count[b]):
                row.add(row.linear(torch.tensor(features[b, t]), "fc"), self.table[tokens[b, t]])
            close(out[b, : count[b]], row.run()[-count[b] :])
        return out[jnp.arange(B), jnp.asarray(count) - 1]


@pytest.fixture(params=VARIANTS)
def both(request: pytest.FixtureRequest, drafters: Callable[[str, str], Path]) -> Both:
    return Both(drafters("eagle3", request.param), draft_config_dict(request.param, "eagle3"))


def test_a_chain_equals_the_statement(both: Both) -> None:
    """Three rounds of four steps, each on the output before; what was drafted is forgotten between rounds."""
    for count in ((8, 5, 1), (3, 1, 4), (1, 2, 3)):
        last = both.commit(count)
        held = both.cache.length
        outs = [row.run()[-1] for row in both.rows]
        for _ in range(4):
            close(both.module.logits(last), torch.stack([both.rows[b].logits(outs[b]) for b in range(B)]))
            tokens = both.tokens(B)
            out, both.cache = both.extend(last[:, None], both.embed(tokens)[:, None], both.cache)
            last = out[:, 0]
            for b, row in enumerate(both.rows):
                row.add(outs[b], both.table[tokens[b]])
                outs[b] = row.run()[-1]
        close(last, torch.stack(outs))
        for b, row in enumerate(both.rows):
            row.forget(int(held[b]))
        both.cache = KVCache(both.cache.k, both.cache.v, held)
    assert both.cache.length.tolist() == [12, 8, 8]


def test_a_tree_equals_the_statement(both: Both) -> None:
    """Levels of three nodes at one position each; every node sees the row, its ancestors and itself."""
    k, depth = 3, 3
    last = both.commit((6, 2, 4))
    held = both.cache.length
    out = jnp.repeat(last[:, None], k, axis=1)
    theirs = [[row.run()[-1]] * k for row in both.rows]
    ancestors = np.zeros((B, 0, 0), bool)
    for level in range(depth):
        tokens = both.tokens(B, k)
        # Level 0 hangs from the row itself, the nodes of the others from nodes of the level before.
        parent = both.rng.integers(0, k, (B, k)) + (level - 1) * k
        ancestors = _grown(ancestors, parent, level)
        mask = tree_mask(held, jnp.asarray(ancestors[:, level * k :]), SLOTS)
        h = jnp.take_along_axis(out, jnp.asarray(parent - (level - 1) * k)[..., None], axis=1) if level else out
        position = jnp.broadcast_to((held + level)[:, None], (B, k))
        out, both.cache = both.extend(h, both.embed(tokens), both.cache, None, position, mask)
        for b, row in enumerate(both.rows):
            n = int(held[b])
            given = theirs[b] if not level else [theirs[b][p - (level - 1) * k] for p in parent[b]]
            for i in range(k):
                seen = n + np.flatnonzero(ancestors[b, level * k + i])
                row.add(given[i], both.table[tokens[b, i]], n + level, [*range(n), *seen])
            theirs[b] = list(row.run()[-k:])
            close(out[b], torch.stack(theirs[b]))
            close(both.module.logits(out[b]), row.logits(torch.stack(theirs[b])))
    for b, row in enumerate(both.rows):
        row.forget(int(held[b]))
    both.cache = KVCache(both.cache.k, both.cache.v, held)
    both.commit((2, 5, 3))


def _grown(ancestors: np.ndarray, parent: np.ndarray, level: int) -> np.ndarray:
    """Ancestors bool [B, n, n] with a level more, each node's its own and its parent's."""
    n, k = ancestors.shape[1], parent.shape[1]
    grown = np.zeros((B, n + k, n + k), bool)
    grown[:, :n, :n] = ancestors
    for b in range(B):
        for i in range(k):
            if level:
                grown[b, n + i] = grown[b, parent[b, i]]
            grown[b, n + i, n + i] = True
    return grown


def test_tree_mask_by_hand() -> None:
    ancestors = jnp.asarray([[[1, 0, 1]], [[0, 1, 1]]], bool)
    mask = tree_mask(jnp.asarray([2, 0]), ancestors, 6).astype(int)
    assert mask.tolist() == [[[1, 1, 1, 0, 1, 0]], [[0, 1, 1, 0, 0, 0]]]


def test_draft_ids_lead_to_the_tokens_that_t2d_marks(drafters: Callable[[str, str], Path]) -> None:
    directory = drafters("eagle3", "tiny")
    tensors = load_file(directory / "model.safetensors")
    drafter = load_drafter(directory, dtype="bfloat16")
    module = drafter.module
    assert isinstance(module, Eagle3)
    got = module.to_target(jnp.arange(300)[None])
    assert got.dtype == jnp.int32 and drafter.params["d2t"].dtype == jnp.int32
    assert got[0].tolist() == np.flatnonzero(tensors["t2d"]).tolist()
    assert tensors["d2t"].any()
