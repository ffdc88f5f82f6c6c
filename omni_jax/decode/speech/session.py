"""Who speaks, and how codes are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.talker_loop import SpeechPlan, SpeechValues
from omni_jax.errors import InputError
from omni_jax.inputs.speech import speaker_ids
from omni_jax.inputs.values import listed, shown, whole

# The longest speech by default: five and a half minutes.
MAX_FRAMES = 4096
# How the reference draws the other codes of a frame when it samples.
RESIDUAL = Sampling(temperature=1.0, top_k=50, top_p=0.8)


@dataclass(frozen=True)
class Voice:
    """Who speaks, how first codes are drawn (a frame's other codes greedily or as `RESIDUAL`), and for how long."""

    speaker: str | Sequence[str]
    sampling: Sampling
    max_frames: int

    def __post_init__(self) -> None:
        frames = whole("max_frames", self.max_frames, "it must be a whole number of at least 1")
        object.__setattr__(self, "max_frames", frames)
        if not isinstance(self.speaker, str):
            listed("speaker", self.speaker, "give a name, or one for each conversation")

    def check(self, rows: int, config: OmniConfig) -> None:
        """Raise InputError for speakers that the model lacks, and for more frames than its Talker can ever make."""
        speaker_ids(self.speaker, rows, config)
        context = config.talker.text.max_position_embeddings if config.talker else 0
        if self.max_frames > (most := max(MAX_FRAMES, context)):
            given = shown(self.max_frames)
            raise InputError(f"max_frames is {given}, but the Talker's context ends at {context}; give at most {most}")

    def repeated(self, times: int) -> "Voice":
        """The voice of rows each of which comes `times` times side by side."""
        if isinstance(self.speaker, str):
            return self
        return replace(self, speaker=[name for name in self.speaker for _ in range(times)])

    def plan(self, config: TalkerConfig) -> SpeechPlan:
        """The static part."""
        residual = self._residual().plan(config.code_predictor.vocab_size)
        return SpeechPlan(self.sampling.plan(config.text.vocab_size), residual)

    def values(self) -> SpeechValues:
        """The traced part."""
        return SpeechValues(self.sampling.values(), self._residual().values())

    def _residual(self) -> Sampling:
        return RESIDUAL if self.sampling.temperature else Sampling()
