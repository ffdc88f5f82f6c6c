"""What all tasks work with, and the results that they make."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.metrics import Recogniser, Scores
from omni_jax.evaluate.processes import shares_model
from omni_jax.evaluate.settings import RunSettings
from omni_jax.evaluate.stored import Result
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Messages, Omni, Reply
from omni_jax.rows.row import reason
from omni_jax.settings import Settings
from omni_jax.weights.drafters import Drafter


@dataclass(frozen=True, eq=False)
class TaskContext:
    """The model, and the settings of every request. slots: requests at once."""

    omni: Omni
    settings: RunSettings
    slots: int
    drafter: Drafter | None = None
    recogniser: Recogniser | None = None

    @property
    def request(self) -> Settings:
        """How every request is made."""
        return self.settings.request

    @property
    def positions(self) -> int:
        """Tokens of the model's context."""
        return self.omni.config.thinker.text.max_position_embeddings

    def prepare(self, messages: Messages) -> Batch:
        """Messages to the arrays that the model takes, one row."""
        return self.omni.prepare(messages, **vars(self.request.preparation))

    def seed_of(self, sample: Sample) -> int:
        """The seed of a sample, which follows from the run's and its id."""
        assert isinstance(self.request.seed, int)
        return seed_of(self.request.seed, sample.id)

    def must_raise(self, error: Exception) -> bool:
        """Whether an error may be that of another process, without which this one cannot go on."""
        return not isinstance(error, InputError) and shares_model(self.omni.params)


def seed_of(seed: int, *what: str | int) -> int:
    """The seed of one sample of a run: the first 63 bits of SHA-256 of the run's seed and of `what`.

    So equal prompts are drawn independently, and a sample gets the same reply whatever other samples run with it.
    """
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def result_of(sample: Sample, scores: Scores, replies: Sequence[Reply] = ()) -> Result:
    """The result of a sample, with the replies that were made for it."""
    result = _named(sample) | {"scores": scores}
    if replies:
        result["turns"] = [{"text": r.text, "token_ids": r.token_ids, "stats": r.stats} for r in replies]
    return result


def failure_of(sample: Sample, error: Exception) -> Result:
    """The result of a sample that cannot be used."""
    return _named(sample) | {"scores": {}, "error": reason(error)}


def _named(sample: Sample) -> dict[str, Any]:
    media = {"media": sample.media} if sample.media else {}
    return {"id": sample.id, "category": sample.category, **media}
