"""What a voice needs beside its settings: a check with the model, and what compiled programs take of it."""

from dataclasses import replace

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.talker_loop import SpeechPlan, SpeechValues
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


def _residual(voice: Voice) -> Sampling:
    return RESIDUAL if voice.speech_temperature else Sampling()
