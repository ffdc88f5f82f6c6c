"""Our Thinker as it is measured."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert import load_hf
from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.acceptance import Rounds
from omni_jax.decode.draft.engine import SpeculativeEngine, rounds_of
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.engine import Engine, PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Declaration, declare, init_params
from omni_jax.models.thinker import Thinker
from omni_jax.quantization import stating
from omni_jax.sharding import check_mesh, make_mesh, shardings
from omni_jax.weights.mesh_text import parse_mesh
from scripts.bench.options import Run
from scripts.bench.system import require
from scripts.small.configs import config_dict


@dataclass(frozen=True)
class Decoded:
    """A decoded batch.

    token_ids: of each row. decode_seconds: without prefill. rounds: of each row, and verified: the number of tokens
    that they verified; both empty without drafts. source: what an oracle drafts these replies from.
    """

    token_ids: list[list[int]]
    decode_seconds: float
    rounds: list[Rounds]
    verified: list[int]
    source: Any


@dataclass(frozen=True)
class OurThinker:
    """Parameters, declaration and sizes of our Thinker; it decodes greedily."""

    params: dict
    declaration: Declaration
    text: DecoderConfig

    def decode(
        self, batch: Batch, new: int, drafts: DraftPlan | None = None, stop_ids: tuple[int, ...] = ()
    ) -> Decoded:
        """Decode at most `new` tokens in each row, with drafts if there is a plan for them."""
        requests = requests_for(batch, Limits(new, stop_ids), [0] * len(batch.token_ids))
        plain = self.engine(stop_ids)
        engine: Engine = plain if drafts is None else SpeculativeEngine(plain, drafts)
        batching = Batching(engine, len(requests), Admission(batch, requests))
        batching.finish()
        drafted = requests if drafts else []
        rounds, verified = [rounds_of(request) for request in drafted], [request.verified for request in drafted]
        token_ids = [request.token_ids for request in requests]
        return Decoded(token_ids, batching.decode_seconds, rounds, verified, requests)

    def decode_all(self, batch: Batch, new: int, drafts: DraftPlan | None = None) -> Decoded:
        """Decode exactly `new` tokens in each row; RuntimeError if there are fewer."""
        decoded = self.decode(batch, new, drafts)
        require("new tokens", [len(ids) for ids in decoded.token_ids], [new] * len(batch.token_ids))
        return decoded

    def engine(self, stop_ids: tuple[int, ...] = ()) -> PlainEngine:
        """The engine that decodes plainly."""
        return PlainEngine(self.params, self.declaration, self.text, Sampling(), stop_ids)


def our_thinker(run: Run, directory: Path | None) -> OurThinker:
    """Our Thinker from a checkpoint, or with random weights made on the device."""
    if directory is None:
        config = OmniConfig.from_hf(stating(config_dict(run.shape), run.quantize))
        params = init_params(Thinker, config.thinker, dtype=jnp.dtype(run.dtype))
    else:
        tree, config = load_hf(directory, parts=("thinker",), dtype=run.dtype, quantize=run.quantize)
        params = tree["thinker"]
    return OurThinker(params, declare(Thinker, config.thinker), config.thinker.text)


def laid_out_thinker(shape: str, dtype: str, mesh_name: str) -> OurThinker:
    """Our Thinker with random weights, laid out over a mesh such as "expert=4"."""
    config = OmniConfig.from_hf(config_dict(shape)).thinker
    mesh = make_mesh(None, **parse_mesh(mesh_name))
    declaration = declare(Thinker, config, mesh=mesh)
    check_mesh({"thinker": (declaration.shapes, declaration.axes)}, mesh)
    make = partial(init_params, Thinker, config, dtype=jnp.dtype(dtype))
    params = jax.jit(make, out_shardings=shardings(declaration.axes, mesh))()
    return OurThinker(params, declaration, config.text)
