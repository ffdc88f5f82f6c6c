"""What a drafter proposes as a reply is written, against its description and the Thinker's states of the whole text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.decode.draft import loop as speculative
from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.loop import Seen
from omni_jax.decode.draft.plan import DraftPlan, KnownDrafters
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.sampling import Sampling
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import bind
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from scripts.small.drafter import draft_config_dict
from scripts.small.oracle import ORACLE, Oracle, oracle
from tests.helpers.decoding import Asked
from tests.helpers.trees import BRANCHES, GREEDY, TREE_ORACLE, expected_tree
from tests.models.statements import BlockStatement, StepStatement
from tests.parity import user


@dataclass(frozen=True, eq=False)
class Listening:
    """Remembers as `real` does while `told` drafts, so that some drafts stand; parameters and memories are both's."""

    real: Any
    told: Oracle
    default_tokens: int = 3
    max_tokens: int = 99

    @property
    def taps(self) -> tuple[int, ...]:
        return self.real.taps

    def max_emitted(self, verify_tokens: int) -> int:
        return self.told.max_emitted(verify_tokens)

    def slots_written(self, verify_tokens: int) -> int:
        return verify_tokens

    def empty(self, params: tuple, *asked: Any) -> tuple:
        return self.real.empty(params[0], *asked), self.told.empty(params[1], *asked)

    def grow(self, memory: tuple, capacity: int) -> tuple:
        return self.real.grow(memory[0], capacity), self.told.grow(memory[1], capacity)

    def remember(self, params: tuple, thinker: Thinker, memory: tuple, seen: Seen) -> tuple:
        told = self.told.remember(params[1], thinker, memory[1], seen)
        return self.real.remember(params[0], thinker, memory[0], seen), told

    def propose(self, params: tuple, thinker: Thinker, memory: tuple, *asked: Any) -> tuple[DraftTree, Any]:
        return self.told.propose(params[1], thinker, memory[1], *asked)[0], memory


@partial(jax.jit, static_argnums=(0, 1, 4))
def proposed(proposer: Any, declaration: Any, params: tuple, state: Any, width: int) -> DraftTree:
    """What the real drafter would propose next."""
    thinker, decode = bind(declaration, params[0]), state.decode
    choose = DraftSampler(decode.rows.keys, decode.cache.length + 1, {}, GREEDY)
    return proposer.propose(params[1][0], thinker, state.memory[0], decode.rows.token, width, choose)[0]


@dataclass
class Case:
    """A drafter's directory, what is drafted, and each row's text with the Thinker's states of it, from one forward."""

    omni: Omni
    directory: Path
    config: dict
    tree: tuple[int, int] | None
    texts: list[list[int]]
    features: list[Any]

    def expected(self, b: int, n: int, width: int) -> tuple[list[int], list[int] | None]:
        """Drafts behind the first n tokens of a row and the one at hand, and their parents in a tree."""
        embed = np.asarray(self.omni.params["thinker"]["embed"])
        text, features = self.texts[b], torch.tensor(self.features[b][:n])
        if "dflash_config" in self.config:
            block = BlockStatement(self.directory, self.config)
            block.remember(features)
            masks = [self.config["dflash_config"]["mask_token_id"]] * (width - 1)
            hidden = block.draft(torch.tensor(embed[[text[n], *masks]]))
            head = torch.tensor(np.asarray(self.omni.params["thinker"].get("lm_head", embed)))
            return (hidden[1:] @ head.T).argmax(-1).tolist(), None
        row, module = StepStatement(self.directory, self.config), load_drafter(self.directory).module
        assert isinstance(module, Eagle3)
        table = row.w.get("embed_tokens.weight", torch.tensor(embed)).numpy()
        for i in range(n):
            row.add(row.linear(features[i], "fc"), table[text[i + 1]])
        if self.tree:
            return expected_tree(row, table, lambda i: module.to_target(jnp.asarray(i)), width, *self.tree)
        drafts = []
        for _ in range(width - 1):
            output = row.run()[-1]
            drafts.append(int(module.to_target(row.logits(output).argmax().numpy())))
            row.add(output, table[drafts[-1]])
        return drafts, None


@pytest.mark.parametrize(
    "kind, variant, tree, width",
    [("dflash", "small", None, 6), ("eagle3", "odd", None, 4), ("eagle3", "tiny", (3, 3), 9)],
)
def test_an_engine_drafts_what_the_description_says(
    kind: str,
    variant: str,
    tree: tuple[int, int] | None,
    width: int,
    omnis: Callable[[str], Omni],
    drafters: Callable[[str, str], Path],
) -> None:
    """Rounds in which some drafts stand, behind a chain or a tree, and a cache that grows on the way."""
    torch.set_num_threads(1)
    omni, directory = omnis(variant), drafters(kind, variant)
    asked = Asked(omni, omni.prepare([user("Just words"), user("And some more of them")]), Sampling(), new=20)
    plain = asked.plainly()
    real = KnownDrafters(omni.config).resolve_draft_plan(load_drafter(directory), width - 1, tree, drawn=False)
    assert real is not None
    told, told_width = (TREE_ORACLE, 2 * BRANCHES + 1) if tree else (ORACLE, 4)
    listening: Any = Listening(real.proposer, told)
    drafting = DraftPlan(listening, (real.params, oracle(plain, told_width, 0.4).params), (told_width,))
    engine = SpeculativeEngine(asked.engine(), drafting)
    prompts = [asked.batch.token_ids[b, :n].tolist() for b, n in enumerate(request.prompt_tokens for request in plain)]
    texts = [prompt + request.token_ids for prompt, request in zip(prompts, plain, strict=True)]
    states = [_states(omni, real.proposer.taps, text) for text in texts]
    case = Case(omni, directory, draft_config_dict(variant, kind), tree, texts, states)
    state, lengths = engine.prefill(asked.batch, asked.requests()).state, []
    for turn in range(5):
        drafts = proposed(real.proposer, engine.target.declaration, engine.params, state, width)
        lengths.append(state.decode.cache.length.tolist())
        for b, n in enumerate(lengths[-1]):
            tokens, parents = case.expected(b, n, width)
            assert drafts.token_ids[b].tolist() == [texts[b][n], *tokens]
            assert parents is None or drafts.parent[b].tolist() == [-1, *parents]
        if turn == 1:
            state = speculative.grow(state, proposer=listening, capacity=512)
        _, state = engine.dispatch(state, engine.plan_of(told_width, 1))
    steps = np.diff(lengths, axis=0)
    assert len(set(steps.ravel().tolist())) > 1, "some drafts stood and some fell"


def _states(omni: Omni, taps: tuple[int, ...], text: list[int]) -> np.ndarray:
    """The Thinker's states of a whole text, side by side: [T, n * D]."""
    thinker, ids = omni.thinker, jnp.asarray([text], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(len(text), dtype=jnp.float32), (3, 1, len(text)))
    tapped = thinker.forward(thinker.embed_tokens(ids), position, taps=taps).taps
    return np.moveaxis(np.asarray(tapped)[:, 0], 0, 1).reshape(len(text), -1)
