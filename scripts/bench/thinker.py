"""Our Thinker as it is measured."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from convert import load_hf
from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.engine import Engine, PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import Request, requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Declaration, declare, init_params
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import check_mesh, make_mesh, parse_mesh, shardings
from scripts.bench.options import Run
from scripts.bench.system import require
from scripts.small.configs import config_dict


@dataclass(frozen=True)
class OurThinker:
    """Parameters, declaration and sizes of our Thinker; it decodes greedily."""

    params: dict
    declaration: Declaration
    text: DecoderConfig

    def engine(self, stop_ids: tuple[int, ...] = ()) -> PlainEngine:
        """The engine that decodes plainly."""
        return PlainEngine(self.params, self.declaration, self.text, Sampling(), stop_ids)

    def decode(self, batch: Batch, new: int, drafts: DraftPlan | None = None) -> "Decoded":
        """`new` tokens in each row; RuntimeError if there are fewer."""
        plain = self.engine()
        decoded = decode(plain if drafts is None else SpeculativeEngine(plain, drafts), batch, Limits(new))
        require("new tokens", [len(request.token_ids) for request in decoded.requests], [new] * len(batch.token_ids))
        return decoded


@dataclass(frozen=True, eq=False)
class Decoded:
    """Requests that are done, one for each row of a batch, and the seconds after their first tokens."""

    requests: list[Request]
    decode_seconds: float

    @property
    def rows(self) -> list[list[int]]:
        """The token ids of each."""
        return [request.token_ids for request in self.requests]


def decode(engine: Engine, batch: Batch, limits: Limits) -> Decoded:
    """Run a request for each row of a batch to its end."""
    requests = requests_for(batch, limits, [0] * len(batch.token_ids))
    batching = Batching(engine, len(requests), Admission(batch, requests))
    batching.finish()
    return Decoded(requests, batching.decode_seconds)


def our_thinker(run: Run, directory: Path | None) -> OurThinker:
    """Our Thinker from a checkpoint, or with random weights made on the device."""
    if directory is None:
        config = OmniConfig.from_hf(config_dict(run.shape))
        params = init_params(Thinker, config.thinker, dtype=jnp.dtype(run.dtype))
    else:
        tree, config = load_hf(directory, parts=("thinker",), dtype=run.dtype)
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
