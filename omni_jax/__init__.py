"""Qwen3-Omni in JAX: text, images, audio and video in; text and speech out.

The one legend of shape letters, used in docstrings, einsums and shape suffixes (`rows_RD`) everywhere:

    B batch             N query heads       E experts              V vocabulary
    T query length      K key/value heads   A active experts       L layers (`l` indexes them)
    S key length        G = N / K           R rows routed,         P patches
    D width             H head dimension      or rows of a batch   M mel bins
                        F mlp width                                Q codebooks
                                                                   W draft block

Batches may hold further letters where a docstring names them. Functions open with `B, T, D = x.shape`. Units stand in
names: `hop_samples`, `frames_per_second`.
"""

__version__ = "0.1.0"
