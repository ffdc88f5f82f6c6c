"""How long does a round of drafting and verifying take? The public block-8 DFlash drafter's shape, random weights.

Almost no draft is accepted then, which changes nothing about a round's time: it runs the same programs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.draft.loop import Proposer, SpeculativeState, decode_rounds, rounds_for
from omni_jax.decode.draft.plan import proposer_for
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import CHUNK
from omni_jax.draft_config import DFlashConfig, read_draft_config
from omni_jax.models.dflash import DFlash
from omni_jax.models.param import declare, init_params
from omni_jax.weights.drafters import Drafter
from scripts.gpu.speed import Model, full_cache
from scripts.gpu.timing import Case, Timing, measure_judged, share_of
from scripts.small.configs import PUBLIC_DFLASH
from scripts.small.drafter import draft_config_dict


@dataclass(frozen=True)
class Drafting:
    """A Thinker, and a drafter with random parameters beside it."""

    model: Model
    proposer: Proposer
    config: DFlashConfig
    params: dict

    def run(self, state: SpeculativeState, tokens: int, program: Any = decode_rounds) -> Any:
        """What the rounds of a chunk give, and the state after them; or what else `program` makes of the arguments."""
        stop_ids, values, count = np.zeros(0, np.int32), Sampling().values(), np.int32(rounds_for(CHUNK, tokens))
        static = {"declaration": self.model.declaration, "plan": self.model.plan, "verify_tokens": tokens}
        params = self.model.params, self.params
        return program(params, state, count, stop_ids, values, proposer=self.proposer, **static)

    def standing(self, rows: int, capacity: int, new: int) -> SpeculativeState:
        """A state with room for just `new` more tokens in every row, in the Thinker's cache and in the drafter's."""
        decode = self.model.standing(rows, capacity, new)
        memory = full_cache(self.config.layers, rows, capacity, new, self.model.params["embed"].dtype)
        return SpeculativeState(decode, memory, jnp.ones((rows,), bool))


def make_drafting(model: Model, shape: str) -> Drafting:
    """A drafter for the Thinker of configuration `shape`."""
    values = PUBLIC_DFLASH if shape == "full" else draft_config_dict(shape, "dflash")
    config = read_draft_config(values)
    assert isinstance(config, DFlashConfig)
    drafter = Drafter("dflash", config, declare(DFlash, config), {}, values, {})
    params = init_params(DFlash, config, dtype=model.params["embed"].dtype)
    proposer = proposer_for(drafter, model.config.text.num_layers)
    return Drafting(model, proposer, config, jax.block_until_ready(params))


def rounds(drafting: Drafting, tokens: int, slots: int) -> list[Timing]:
    """Rounds of one row that verify `tokens` tokens, in caches of `slots` slots."""
    turns = rounds_for(CHUNK, drafting.proposer.max_emitted(tokens))
    share = share_of(drafting.model.config.text, tokens)
    case = Case(f"verify 1 x {tokens}, {slots} slots", turns, 1, "rounds/s", share=share)
    # Room for all drafts of all rounds, were they accepted.
    state = drafting.standing(1, slots, turns * tokens * (case.repetitions + 1) + tokens)
    lower = partial(drafting.run, state, tokens, decode_rounds.lower)

    def run() -> jax.Array:
        nonlocal state
        made, state = drafting.run(state, tokens)
        return made

    return [measure_judged(case, lower, run)]
