"""One question, decoded plainly and with drafts."""

from dataclasses import dataclass, field
from typing import Any

from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.engine import Engine, PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import Request, requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni
from tests.parity import audio_part, image_part, user, video_part

NEW = 40

MIXED = [
    user("Just words."),
    user(image_part(90, 90, 5), "One picture, and more words than in the first row."),
    user(audio_part(1.2, 5), video_part(4, 64, 64, 2.0, 6), "Both."),
]


@dataclass
class Asked:
    """One question to both ways of decoding."""

    omni: Omni
    batch: Batch
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    new: int = NEW
    seed: Any = field(default_factory=lambda: [3, 4, 5])

    def plainly(self) -> list[Request]:
        return self.run(self.engine())

    def drafted(self, drafts: DraftPlan) -> list[Request]:
        return self.run(SpeculativeEngine(self.engine(), drafts))

    def engine(self) -> PlainEngine:
        omni = self.omni
        parts = omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text
        return PlainEngine(*parts, self.sampling, self.stop_ids)

    def requests(self) -> list[Request]:
        seeds = self.seed[: len(self.batch.token_ids)]
        return requests_for(self.batch, Limits(self.new, self.stop_ids), seeds, self.sampling)

    def run(self, engine: Engine) -> list[Request]:
        requests = self.requests()
        Batching(engine, len(requests), Admission(self.batch, requests)).finish()
        return requests


def ids(requests: list[Request]) -> list[list[int]]:
    """The token ids of each."""
    return [request.token_ids for request in requests]
