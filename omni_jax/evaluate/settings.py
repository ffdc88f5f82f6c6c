"""The settings of a run."""

from dataclasses import asdict, dataclass
from typing import Any

from omni_jax.evaluate.metrics import MetricName
from omni_jax.flags import MediaFlags
from omni_jax.settings import Settings

# Settings of a request that no flag of an evaluation changes; they are not stored.
FIXED = ("logprobs", "stop_ids", "tools", "speech_top_k", "speech_top_p", "speech_repetition_penalty")


@dataclass(frozen=True)
class RunSettings:
    """All that a result depends on, apart from sample, model and drafter."""

    task: str
    """What is done with a sample; see `tasks`."""
    metrics: tuple[MetricName, ...]
    """How replies are compared with references."""
    recogniser: str | None
    """What recognises speech, as module:function."""
    media: MediaFlags
    """Options of media as flags, which are stored as they were given."""
    request: Settings
    """How every request is made. Its seed is the run's; `context.seed_of` gives each sample's."""

    def stored(self) -> dict[str, Any]:
        """The settings by name, as a run's directory holds them."""
        made = {"task": self.task, "metrics": self.metrics, **self.request.keywords(), "media": asdict(self.media)}
        return {name: value for name, value in made.items() if name not in FIXED} | {"recogniser": self.recogniser}
