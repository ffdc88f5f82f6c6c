"""What a voice needs beside its settings: a check with the model, and what compiled programs take of it."""

from collections.abc import Sequence
from dataclasses import replace

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.decode.rows import note_seen
from omni_jax.decode.sampling import Plan, Sampling, values_by_row
from omni_jax.decode.speech.talker_loop import SpeechPlan, SpeechState, SpeechValues
from omni_jax.errors import InputError
from omni_jax.inputs.speech import speaker_ids
from omni_jax.inputs.values import shown
from omni_jax.settings import Voice

# The longest speech by default: five and a half minutes.
MAX_FRAMES = Voice.max_frames
# How the reference draws the other codes of a frame when it samples; otherwise all are greedy.
RESIDUAL = Sampling(temperature=1.0, top_k=50, top_p=0.8)


def check_voice(voice: Voice, rows: int, config: OmniConfig) -> None:
    """Raise InputError for speakers that the model lacks, and for more frames than its Talker can ever make."""
    speaker_ids(voice.speaker, rows, config)
    context = config.talker.text.max_position_embeddings if config.talker else 0
    if voice.max_frames > (most := max(MAX_FRAMES, context)):
        given = shown(voice.max_frames)
        raise InputError(f"max_frames is {given}, but the Talker's context ends at {context}; give at most {most}")


def repeated(voice: Voice, times: int) -> Voice:
    """The voice of rows each of which comes `times` times side by side."""
    if isinstance(voice.speaker, str):
        return voice
    return replace(voice, speaker=[name for name in voice.speaker for _ in range(times)])


def speech_plan(voice: Voice, config: TalkerConfig) -> SpeechPlan:
    """The static part of how codes are drawn."""
    residual = _residual(voice).plan(config.code_predictor.vocab_size)
    return SpeechPlan(voice.sampling.plan(config.text.vocab_size), residual)


def speech_values(voice: Voice) -> SpeechValues:
    """The traced part of how codes are drawn."""
    return SpeechValues(voice.sampling.values(), _residual(voice).values())


class Voices:
    """How codes are drawn of rows that speak beside each other; as in their call where no voice draws otherwise."""

    def __init__(self, voice: Voice, config: TalkerConfig):
        """voice: of the call; its speaker and limit are ignored."""
        self.voice, self.vocab_size = voice, config.text.vocab_size
        self.plan, self.values = speech_plan(voice, config), speech_values(voice)
        # For any voices side by side.
        self._shared = SpeechPlan(Plan(False, True, self.vocab_size), RESIDUAL.plan(config.code_predictor.vocab_size))

    def of(self, voices: Sequence[Voice | None]) -> tuple[SpeechPlan, SpeechValues]:
        """How these rows draw, None for one that makes no frame: the static part, and values [B, 1] or for all rows."""
        if all(voice is None or voice.sampling == self.voice.sampling for voice in voices):
            return self.plan, self.values
        known = [self.voice if voice is None else voice for voice in voices]
        first, residual = ([one(voice) for voice in known] for one in (lambda voice: voice.sampling, _residual))
        return self._shared, SpeechValues(values_by_row(first), values_by_row(residual))

    def fit(self, state: SpeechState, plan: SpeechPlan) -> SpeechState:
        """The state with as much noted about its rows as the plan needs."""
        return note_seen(state, self.vocab_size if plan.first.penalised else 0)


def _residual(voice: Voice) -> Sampling:
    return RESIDUAL if voice.speech_temperature else Sampling()
