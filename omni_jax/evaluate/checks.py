"""What can be told of a run's settings from the checkpoint's config.json alone, before any weight is read."""

import os
from contextlib import suppress

import jax

from omni_jax.config import OmniConfig
from omni_jax.decode.drafting import Draftings
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import is_whole, row_keys
from omni_jax.decode.speech import Voice
from omni_jax.drafter import Drafter
from omni_jax.errors import InputError
from omni_jax.evaluate.tasks import Settings
from omni_jax.inputs.speech import speaker_ids
from omni_jax.inputs.video import check_fps
from omni_jax.ops.cache import slots_for
from omni_jax.placement import memory_limit

HALF = 2  # bytes of a number in half precision


def check_settings(settings: Settings, slots: int, config: OmniConfig) -> None:
    """Raise InputError, naming the setting, for what no sample could be run with."""
    for name, value in (("slots", slots), ("max_new_tokens", settings.max_new_tokens)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is {value!r}; have at least one")
    _check_memory(slots, config)
    limit = config.thinker.text.max_position_embeddings
    if settings.task in ("generate", "mt-bench", "speech") and settings.max_new_tokens >= limit:
        asked = f"max_new_tokens is {settings.max_new_tokens}"
        raise InputError(f"{asked}, and the model's context is {limit}; leave room for the prompt")
    Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty)
    row_keys(settings.seed, 1)
    check_fps(settings.fps)
    if settings.task == "speech":
        speaker_ids(settings.speaker, 1, config)
        try:
            Voice(settings.speaker, Sampling(settings.speech_temperature), settings.max_frames)
        except InputError as error:
            raise InputError(f"speech: {error}") from error


def _check_memory(slots: int, config: OmniConfig) -> None:
    """InputError if the smallest caches of all slots, in half precision, are more than all the memory there is."""
    text, memory = config.thinker.text, _memory()
    row = 2 * text.num_layers * text.num_kv_heads * slots_for(1) * text.head_dim * HALF
    if memory is not None and slots * row > memory:
        had = f"{slots * row / 1e9:.1f} GB, and there are {memory / 1e9:.1f}"
        raise InputError(
            f"slots is {slots}: their caches alone would take {had}; ask for {memory // row // 2} or fewer"
        )


def _memory() -> int | None:
    """Bytes that all devices hold together or, where they do not say, the host; None where that does not say either."""
    limits = [memory_limit(device) for device in jax.devices()]
    if None not in limits:
        return sum(limit for limit in limits if limit)
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_drafting(settings: Settings, drafter: Drafter | None, config: OmniConfig) -> None:
    """Raise InputError for a drafter of another model, or that does not draft as the settings say."""
    Draftings(config).settle(drafter, settings.draft_tokens, settings.draft_tree, settings.draft_sampling)
