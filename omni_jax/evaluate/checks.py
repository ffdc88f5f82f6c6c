"""What a run's settings can be checked for with the checkpoint's config.json alone, before any weight is read."""

from pathlib import Path

import jax

from omni_jax.config import OmniConfig
from omni_jax.decode.draft.plan import Draftings
from omni_jax.decode.memory import GB, available
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import row_keys
from omni_jax.decode.speech.session import Voice
from omni_jax.decode.stops import StopStrings
from omni_jax.errors import InputError
from omni_jax.evaluate.settings import Settings
from omni_jax.inputs.options import read_defaults
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import whole
from omni_jax.weights.budget import cache_bytes
from omni_jax.weights.drafters import Drafter

HALF = 2  # bytes of a number in half precision


def check_settings(settings: Settings, slots: int, config: OmniConfig) -> None:
    """Raise InputError, naming the setting, for what no sample could be run with."""
    for name, value in (("slots", slots), ("max_new_tokens", settings.max_new_tokens)):
        whole(name, value, "have at least one")
    _check_slots(slots, config)
    limit = config.thinker.text.max_position_embeddings
    if settings.task in ("generate", "mt-bench", "speech") and settings.max_new_tokens >= limit:
        asked = f"max_new_tokens is {settings.max_new_tokens}"
        raise InputError(f"{asked}, and the model's context is {limit}; leave room for the prompt")
    Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty)
    row_keys(settings.seed, 1)
    read_defaults(settings.media.options(), settings.fps, settings.use_audio_in_video)
    if settings.task == "speech":
        try:
            Voice(settings.speaker, Sampling(settings.speech_temperature), settings.max_frames).check(1, config)
        except InputError as error:
            raise InputError(f"speech: {error}") from error


def _check_slots(slots: int, config: OmniConfig) -> None:
    """InputError if the smallest caches of all slots, in half precision, are more than all devices can hold."""
    row, memory = cache_bytes(config.thinker.text, HALF, {}, 1, 1), available(None) * len(jax.devices())
    if slots * row > memory:
        had = f"{slots * row / GB:,.1f} GB, and there are {memory / GB:,.1f}"
        raise InputError(
            f"slots is {slots}: their caches alone would take {had}; ask for {memory // row // 2} or fewer"
        )


def check_stop(settings: Settings, model: Path) -> None:
    """Raise InputError for texts that could never end a reply of a checkpoint's tokenizer."""
    if settings.stop:
        StopStrings.read(settings.stop, Tokenizer(model))


def check_drafting(settings: Settings, drafter: Drafter | None, config: OmniConfig) -> None:
    """Raise InputError for a drafter of another model, or that does not draft as the settings say."""
    Draftings(config).settle(drafter, settings.draft_tokens, settings.draft_tree, settings.draft_sampling)
