"""Qwen3-Omni in JAX: text, images, audio and video in, text and speech out.

The one legend of shape letters, used in docstrings, einsums and shape suffixes (`rows_RD`) everywhere:

    B batch             N query heads       E experts              V vocabulary
    T query length      K key/value heads   A active experts       L layers (`l` indexes them)
    S key length        G = N / K           R rows routed,         P patches
    D width             H head dimension      or rows of a batch   M mel bins
                        F mlp width                                Q codebooks
                                                                   W draft block

Second meanings, where a docstring says so: F frames, R rounds of drafting, W windows of audio.

A docstring may name further letters. Functions open with `B, T, D = x.shape`. Units are part of names: `hop_samples`,
`frames_per_second`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_jax.config import OmniConfig as OmniConfig
    from omni_jax.decode.prompt import Prompt as Prompt
    from omni_jax.decode.reply import Event as Event
    from omni_jax.decode.reply import Reply as Reply
    from omni_jax.errors import CheckpointError as CheckpointError
    from omni_jax.errors import ConfigError as ConfigError
    from omni_jax.errors import InputError as InputError
    from omni_jax.errors import OmniError as OmniError
    from omni_jax.inputs.batch import Batch as Batch
    from omni_jax.loading import load as load
    from omni_jax.models.param import bind as bind
    from omni_jax.omni import Omni as Omni
    from omni_jax.sound import write_sound as write_sound
    from omni_jax.weights.drafters import Drafter as Drafter
    from omni_jax.weights.drafters import load_drafter as load_drafter

__version__ = "0.1.0"

# The module that defines each public name. It is imported at the first use, so that importing a part stays light.
_PUBLIC = {
    "load": "omni_jax.loading",
    "Omni": "omni_jax.omni",
    "Prompt": "omni_jax.decode.prompt",
    "Batch": "omni_jax.inputs.batch",
    "Reply": "omni_jax.decode.reply",
    "Event": "omni_jax.decode.reply",
    "bind": "omni_jax.models.param",
    "Drafter": "omni_jax.weights.drafters",
    "load_drafter": "omni_jax.weights.drafters",
    "write_sound": "omni_jax.sound",
    "OmniConfig": "omni_jax.config",
    "OmniError": "omni_jax.errors",
    "ConfigError": "omni_jax.errors",
    "CheckpointError": "omni_jax.errors",
    "InputError": "omni_jax.errors",
}


def __dir__() -> list[str]:
    return ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omni_jax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
