"""The settings of a run."""

from dataclasses import dataclass
from typing import Any

from omni_jax.evaluate.metrics import MetricName
from omni_jax.settings import Settings

# Settings of a request that no flag of an evaluation changes; they are not stored.
FIXED = ("logprobs", "stop_ids", "tools")


@dataclass(frozen=True)
class RunSettings:
    """All that a result depends on, apart from sample, model and drafter."""

    task: str
    """What is done with a sample; see `tasks`."""
    metrics: tuple[MetricName, ...]
    """How replies are compared with references."""
    recogniser: str | None
    """What recognises speech, as module:function."""
    request: Settings
    """How every request is made. Its seed is the run's; `context.seed_of` gives each sample's."""

    def stored(self) -> dict[str, Any]:
        """The settings by name, as a run's directory holds them."""
        made = {"task": self.task, "metrics": self.metrics, **self.request.keywords()}
        return {name: value for name, value in made.items() if name not in FIXED} | {"recogniser": self.recogniser}
