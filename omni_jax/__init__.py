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

from typing import Any

__version__ = "0.1.0"

# The module that defines each public name. It is imported at the first use, so that importing a part stays light.
_PUBLIC = {
    "load": "omni_jax.loading",
    "Omni": "omni_jax.omni",
    "Reply": "omni_jax.omni",
    "Event": "omni_jax.omni",
    "bind": "omni_jax.models.param",
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
