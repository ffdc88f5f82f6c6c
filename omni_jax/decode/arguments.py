"""Arguments of the public functions: their types and ranges, and names that other libraries use.

A call is checked before anything is read, prepared or compiled, and an error names the argument and what to give
instead. NumPy's numbers are numbers.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from omni_jax.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

# What other libraries call an argument, and what it is called here.
RENAMED = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "max_output_tokens": "max_new_tokens",
    "max_gen_toks": "max_new_tokens", "num_return_sequences": "n", "best_of": "n", "stop_strings": "stop",
    "stop_sequences": "stop", "until": "stop", "stop_token_ids": "stop_ids", "eos_token_id": "stop_ids",
    "top_logprobs": "logprobs", "output_scores": "logprobs", "output_logits": "logprobs",
    "enable_thinking": "thinking", "rep_penalty": "repetition_penalty", "voice": "speaker", "return_audio": "speech",
    "assistant_model": "drafter", "torch_dtype": "dtype", "device_map": "mesh", "tensor_parallel_size": "mesh",
    "batch_size": "slots", "max_num_seqs": "slots",
}  # fmt: skip
# What has no counterpart here, and what to do instead.
INSTEAD = {
    "do_sample": "temperature decides: 0 is greedy, anything above it draws",
    "presence_penalty": "there is repetition_penalty, which acts on all tokens that occurred",
    "frequency_penalty": "there is repetition_penalty, which acts on all tokens that occurred",
    "num_beams": "replies are drawn or greedy; leave it out",
    "max_length": "max_new_tokens limits the reply without its prompt",
    "min_new_tokens": "stop_ids=() lets a reply run to max_new_tokens",
    "ignore_eos": "stop_ids=() lets a reply run to max_new_tokens",
    "n": "generate gives several replies of one conversation",
    "stream": "call stream instead",
    **dict.fromkeys(
        ("speech", "speaker", "max_frames", "speech_temperature", "speech_top_k", "speech_top_p"),
        "generate and stream speak",
    ),
}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose unknown keywords raise InputError with the name that was meant.

    The one place that passes keywords on unseen; the signature stays that of the function.
    """
    known = inspect.signature(function).parameters

    @wraps(function)
    def checked(*given: P.args, **named: P.kwargs) -> R:
        for name in named:
            if name not in known:
                raise InputError(f"{function.__name__} has no {name!r}; {_meant(name, list(known))}")
        return function(*given, **named)

    return checked


def _meant(name: str, known: Sequence[str]) -> str:
    if RENAMED.get(name) in known:
        return f"it is called {RENAMED[name]} here"
    if name in INSTEAD:
        return INSTEAD[name]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"


def plain(value: Any) -> Any:
    """A scalar of NumPy or JAX, or an array without axes, as the number of Python; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, of Python, NumPy or JAX."""
    value = plain(value)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole(name: str, value: Any, remedy: str, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most` as an int; InputError, with the remedy, for anything else."""
    found = plain(value)
    if not is_whole(found) or found < least or (most is not None and found > most):
        raise InputError(f"{name} is {shown(value)}; {remedy}")
    return int(found)


def number_of(name: str, value: Any) -> int | float:
    """A number of Python, NumPy or JAX as an int or float; InputError for anything else."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float | np.floating):
        raise InputError(f"{name} is {shown(value)}; it must be a number")
    return found if isinstance(found, int) else float(found)


def flag(name: str, value: Any) -> bool:
    """True or False as a bool; InputError for what only counts as one, such as the text "no"."""
    if not isinstance(plain(value), bool):
        raise InputError(f"{name} is {shown(value)}; it is True or False")
    return bool(value)


def listed(name: str, value: Any, remedy: str) -> list[Any]:
    """The items of a list, tuple, set, range or array; InputError for text, bytes and anything else."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence | set | frozenset):
        raise InputError(f"{name} is {shown(value)}; {remedy}")
    return list(value)


def shown(value: Any) -> str:
    """A value as an error shows it: short, and without an object's address."""
    try:
        text = repr(value)
    except Exception:  # the number is too long for text, or somebody's __repr__ fails
        text = ""
    if not text or " at 0x" in text or text.startswith("<"):
        return f"of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... (type {type(value).__name__})"
