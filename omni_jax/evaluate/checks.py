"""What a run's settings can be checked for with the checkpoint's config.json alone, before any weight is read."""

from pathlib import Path

import jax

from omni_jax.config import OmniConfig
from omni_jax.decode.draft.plan import KnownDrafters
from omni_jax.decode.limits import seeds_of
from omni_jax.decode.memory import GB, available
from omni_jax.decode.speech.voice import check_voice
from omni_jax.decode.stops import StopStrings
from omni_jax.errors import InputError
from omni_jax.evaluate.settings import RunSettings
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import whole
from omni_jax.weights.budget import cache_bytes
from omni_jax.weights.drafters import Drafter

HALF = 2  # bytes of a number in half precision


def check_settings(settings: RunSettings, slots: int, config: OmniConfig) -> None:
    """Raise InputError, naming the setting, for what no sample could be run with."""
    whole("slots", slots, "have at least one")
    _check_slots(slots, config)
    request, limit = settings.request, config.thinker.text.max_position_embeddings
    most = request.ending.max_new_tokens
    if settings.task in ("generate", "mt-bench", "speech") and most >= limit:
        raise InputError(f"max_new_tokens is {most}, and the model's context is {limit}; leave room for the prompt")
    seeds_of(request.seed, 1)
    if settings.task == "speech":
        try:
            check_voice(request.voice, 1, config)
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


def check_stop(settings: RunSettings, model: Path) -> None:
    """Raise InputError for texts that could never end a reply of a checkpoint's tokenizer."""
    if settings.request.ending.stop:
        StopStrings.read(settings.request.ending.stop, Tokenizer(model))


def check_drafting(settings: RunSettings, drafter: Drafter | None, config: OmniConfig) -> None:
    """Raise InputError for a drafter of another model, or that does not draft as the settings say."""
    drafting = settings.request.drafting
    KnownDrafters(config).resolve_draft_plan(
        drafter, drafting.draft_tokens, drafting.draft_tree, drafting.draft_sampling
    )
