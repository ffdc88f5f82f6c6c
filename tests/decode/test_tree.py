"""Trees of drafts: EAGLE-3's own against its description, and that drafting them changes no reply."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.decode.draft.eagle3 import Pairs, TreeProposer
from omni_jax.decode.draft.plan import DraftPlan, KnownDrafters
from omni_jax.decode.draft.tree import DraftSampler
from omni_jax.decode.sampling import Sampling
from omni_jax.errors import InputError
from omni_jax.models.eagle3 import Eagle3
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from scripts.small.drafter import draft_config_dict
from scripts.small.oracle import oracle
from tests.helpers.decoding import MIXED, NEW, Asked, ids
from tests.helpers.trees import BRANCHES, GREEDY, TREE_ORACLE, expected_tree
from tests.models.statements import StepStatement
from tests.parity import user


@pytest.mark.parametrize("sampling, levels", [(Sampling(), 4), (Sampling(1.0, top_k=20, repetition_penalty=1.3), 2)])
def test_a_tree_changes_the_rounds_and_nothing_else(
    sampling: Sampling, levels: int, omnis: Callable[[str], Omni]
) -> None:
    asked = Asked(omnis("odd"), omnis("odd").prepare(MIXED), sampling)
    plain = asked.plainly()
    for lies in (0.0, 0.3, 1.0):
        width = BRANCHES * levels + 1
        drafted = asked.drafted(DraftPlan(TREE_ORACLE, oracle(plain, width, lies).params, (width,)))
        assert ids(drafted) == ids(plain)
        emitted = [request.given for request in drafted]
        if lies == 0.0:
            whole, rest = divmod(NEW - 1, levels + 1)
            assert emitted == [[levels + 1] * whole + [rest] * (rest > 0)] * len(plain)
        elif lies == 1.0:
            assert {gave for row in emitted for gave in row} == {1}
        else:
            assert all(1 < np.mean(row) < levels + 1 for row in emitted)


@pytest.mark.parametrize("variant, width, depth, k", [("tiny", 20, 3, 4), ("odd", 9, 5, 2), ("small", 4, 4, 3)])
def test_the_tree_is_that_of_the_description(
    variant: str, width: int, depth: int, k: int, drafters: Callable[[str, str], Path]
) -> None:
    directory, rng = drafters("eagle3", variant), np.random.default_rng(3)
    drafter = load_drafter(directory)
    module, config = drafter.module, draft_config_dict(variant, "eagle3")
    assert isinstance(module, Eagle3)
    held, (D, features) = (5, 2), module.fc.weight.shape
    h = rng.standard_normal((2, 5, features)).astype(np.float32)
    target = 0.7 * rng.standard_normal((config["vocab_size"], D)).astype(np.float32)
    rows = [StepStatement(directory, config) for _ in held]
    table = rows[0].w.get("embed_tokens.weight", torch.tensor(target)).numpy()
    tokens = rng.integers(0, len(table), (2, 5))
    embedded = module.embed_tokens(jnp.asarray(tokens), jnp.asarray(target))
    out, cache = module.extend(
        module.fuse(jnp.asarray(h)), embedded, module.empty(2, 64, jnp.float32), jnp.asarray(held)
    )
    memory = Pairs(cache, out[jnp.arange(2), jnp.asarray(held) - 1])
    proposer = TreeProposer(drafter.declaration, (), depth=depth, top_k=k)
    choose = DraftSampler(jnp.zeros(2), cache.length, {}, GREEDY)
    thinker: Any = SimpleNamespace(embed=jnp.asarray(target))
    at_hand = jnp.asarray([1, 2], jnp.int32)
    drafts, after = jax.jit(lambda: proposer.propose(drafter.params, thinker, memory, at_hand, width, choose))()
    np.testing.assert_array_equal(after.cache.length, cache.length)
    assert drafts.longest == min(width, depth + 2) and drafts.token_ids.shape == (2, width)
    for b, row in enumerate(rows):
        for t in range(held[b]):
            row.add(row.linear(torch.tensor(h[b, t]), "fc"), table[tokens[b, t]])
        want, parents = expected_tree(row, table, lambda i: module.to_target(jnp.asarray(i)), width, depth, k)
        assert drafts.token_ids[b].tolist() == [int(at_hand[b]), *want]
        assert drafts.parent[b].tolist() == [-1, *parents]


@pytest.mark.parametrize(
    "variant, tree, tokens, drawn",
    [("odd", (7, 10), None, {}), ("small", (3, 4), 20, {"temperature": 1.0, "top_k": 5, "seed": [7, 8, 9]})],
)
def test_eagle_trees_say_what_the_model_says(
    variant: str,
    tree: tuple[int, int],
    tokens: int | None,
    drawn: dict[str, Any],
    omnis: Callable[[str], Omni],
    drafters: Callable[[str, str], Path],
) -> None:
    omni, drafter = omnis(variant), load_drafter(drafters("eagle3", variant))
    settings: dict[str, Any] = {"max_new_tokens": 24, "stop_ids": (), **drawn}
    want = omni.generate(MIXED, **settings)
    got = omni.generate(MIXED, drafter=drafter, draft_tree=tree, draft_tokens=tokens, **settings)
    assert [reply.token_ids for reply in got] == [reply.token_ids for reply in want]


def test_a_tree_has_room_where_the_reply_almost_fills_the_cache(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter, new = omnis("small"), load_drafter(drafters("eagle3", "small")), 12
    batch = omni.prepare(user("word " * 57))
    assert 236 < batch.token_ids.shape[1] + new < 256 < batch.token_ids.shape[1] + new + 20
    asked = Asked(omni, batch, Sampling(), new=new)
    drafting = KnownDrafters(omni.config).resolve_draft_plan(drafter, 19, (3, 4), drawn=False)
    assert drafting is not None and ids(asked.drafted(drafting)) == ids(asked.plainly())


def test_trees_that_cannot_be_drafted_are_refused(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    eagle, dflash = (load_drafter(drafters(kind, "small")) for kind in ("eagle3", "dflash"))
    for drafter, settings, complaint in (
        (dflash, {"draft_tree": (7, 10)}, "DFlash drafter drafts blocks"),
        (eagle, {"draft_tree": (7, 0)}, r"draft_tree is \(7, 0\)"),
        (eagle, {"draft_tree": (1, 10**6)}, "1000000 nodes are more than 256"),
        (eagle, {"draft_tree": [7, 10]}, r"draft_tree is \[7, 10\]"),
        (eagle, {"draft_tree": 5}, "draft_tree is 5"),
        (eagle, {"draft_tree": (2, 2), "draft_tokens": "auto"}, "draft_tokens is 'auto'"),
        (eagle, {"draft_tree": (2, 2), "draft_tokens": 11}, "1 to 10 tokens"),
        (eagle, {"draft_tree": (2, 2), "draft_sampling": True}, "fixed number"),
    ):
        with pytest.raises(InputError, match=complaint):
            omnis("small").generate(user("Hi"), drafter=drafter, **settings)  # type: ignore[arg-type]
