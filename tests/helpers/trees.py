"""Trees of drafts: an oracle that drafts them, and the tree of EAGLE-3 written from its description."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.sampling import Plan
from omni_jax.models.thinker import Thinker
from scripts.small.oracle import Oracle
from tests.models.statements import StepStatement

GREEDY = Plan(greedy=True, penalised=False, candidates=0)

BRANCHES = 3


@dataclass(frozen=True, eq=False)
class TreeOracle(Oracle):
    """Three tokens a level behind the right one of the level before; the right one is among them unless it lies."""

    def max_emitted(self, verify_tokens: int) -> int:
        return (verify_tokens - 1) // BRANCHES + 1

    def propose(
        self,
        params: dict,
        thinker: Thinker,
        memory: jax.Array,
        token: jax.Array,
        verify_tokens: int,
        choose: DraftSampler,
    ) -> tuple[DraftTree, jax.Array]:
        levels = self.max_emitted(verify_tokens) - 1
        chain, memory = super().propose(params, thinker, memory, token, levels + 1, choose)
        right, place = chain.token_ids[:, 1:], (7 * np.arange(levels) + 1) % BRANCHES
        away = (np.arange(BRANCHES) - place[:, None]) % BRANCHES
        token_ids = (right[..., None] + away) % thinker.embed.shape[0]
        before = np.concatenate([[0], 1 + BRANCHES * np.arange(levels - 1) + place[:-1]])
        parent = np.concatenate([[-1], np.repeat(before, BRANCHES)])
        token_ids = jnp.concatenate([token[:, None], token_ids.reshape(len(token), -1)], axis=1)
        return DraftTree(token_ids, jnp.broadcast_to(parent, token_ids.shape), longest=levels + 1), memory


TREE_ORACLE = TreeOracle()


def expected_tree(row: StepStatement, table: np.ndarray, to_target: Any, width: int, depth: int, k: int) -> tuple:
    """EAGLE's tree from its description: tokens and parents of the nodes behind the token at hand."""
    candidates: list[dict] = []

    def children(output: Any, score: float, parent: int) -> list[int]:
        best, ids = torch.log_softmax(row.logits(output), -1).topk(k)
        for gain, i in zip(best.tolist(), ids.tolist(), strict=True):
            candidates.append({"token": int(to_target(i)), "score": score + gain, "parent": parent, "before": output})
        return list(range(len(candidates) - k, len(candidates)))

    held = len(row.h)
    frontier, run = children(row.run()[-1], 0.0, -1), {}
    for level in range(depth):
        for c in frontier:
            up, seen = candidates[c]["parent"], []
            while up >= 0:
                seen.append(run[up])
                up = candidates[up]["parent"]
            given = candidates[c]["before"], table[candidates[c]["token"]]
            run[c] = row.add(*given, held + level, [*range(held), *seen])
        outputs = row.run()[-k:]
        made = [j for c, out in zip(frontier, outputs, strict=True) for j in children(out, candidates[c]["score"], c)]
        frontier = sorted(made, key=lambda j: -candidates[j]["score"])[:k]
    row.forget(held)
    kept = sorted(sorted(range(len(candidates)), key=lambda j: -candidates[j]["score"])[: width - 1])
    number = {c: n + 1 for n, c in enumerate(kept)} | {-1: 0}
    return [candidates[c]["token"] for c in kept], [number[candidates[c]["parent"]] for c in kept]
