"""The settings of a run."""

from dataclasses import dataclass
from typing import Literal

from omni_jax.evaluate.metrics import MetricName
from omni_jax.media_flags import MediaFlags


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, beside sample and model. seed: of the run; `tasks.seed_of` gives each sample's."""

    task: str
    metrics: tuple[MetricName, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    use_audio_in_video: bool
    fps: float | None
    media: MediaFlags
    thinking: bool | None
    recogniser: str | None
    speaker: str
    speech_temperature: float
    max_frames: int
    draft_tokens: int | Literal["auto"] | None
    draft_tree: tuple[int, int] | None
    draft_sampling: bool
