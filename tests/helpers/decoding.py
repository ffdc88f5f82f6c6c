"""One question, decoded plainly and with drafts."""

from dataclasses import dataclass, field
from typing import Any

from omni_jax.decode.draft.plan import Drafting
from omni_jax.decode.draft.session import DraftedSession
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
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

    def plainly(self) -> Session:
        return self._run(Session(*self._arguments(), ()))

    def drafted(self, drafting: Drafting) -> DraftedSession:
        return self._run(DraftedSession(*self._arguments(), (), drafting))

    def _arguments(self) -> tuple:
        omni, seed = self.omni, self.seed[: len(self.batch.token_ids)]
        text = omni.config.thinker.text
        head = (omni.params["thinker"], omni.declarations["thinker"], text, self.batch, self.sampling)
        return (*head, self.new, seed, self.stop_ids)

    @staticmethod
    def _run(session: Any) -> Any:
        for _ in session.chunks():
            pass
        return session
