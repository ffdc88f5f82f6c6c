"""What can be told of a run's settings from the checkpoint's config.json alone, before any weight is read."""

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


def check_settings(settings: Settings, slots: int, config: OmniConfig) -> None:
    """Raise InputError, naming the setting, for what no sample could be run with."""
    for name, value in (("slots", slots), ("max_new_tokens", settings.max_new_tokens)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is {value!r}; have at least one")
    Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty)
    row_keys(settings.seed, 1)
    check_fps(settings.fps)
    if settings.task == "speech":
        speaker_ids(settings.speaker, 1, config)
        try:
            Voice(settings.speaker, Sampling(settings.speech_temperature), settings.max_frames)
        except InputError as error:
            raise InputError(f"speech: {error}") from error


def check_drafting(settings: Settings, drafter: Drafter | None, config: OmniConfig) -> None:
    """Raise InputError for a drafter of another model, or that does not draft as the settings say."""
    Draftings(config).settle(drafter, settings.draft_tokens, settings.draft_tree, settings.draft_sampling)
