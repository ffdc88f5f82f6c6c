"""Arguments of the public functions: names that other libraries use, and their names here.

A call is checked before anything is read, prepared or compiled. What the values may be is checked by `inputs.values`.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from textwrap import fill
from typing import ParamSpec, TypeVar

from omni_jax.errors import InputError
from omni_jax.settings import Keywords, meanings, parameters
from omni_jax.weights.drafters import Drafter


class GenerateArguments(Keywords, total=False):
    """The keywords of `Omni.generate` but `n`, for its overloads."""

    speech: bool
    drafter: Drafter | None


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
}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose unknown keywords raise InputError with the name that was meant.

    The one place that passes keywords on unseen. The signature stays that of the function, except that `**settings`
    becomes the settings themselves, each with its type and default; the docstring gets a list of what they mean.
    """
    own = inspect.signature(function)
    shown = _with_settings(own)
    known = list(shown.parameters)

    @wraps(function)
    def checked(*given: P.args, **named: P.kwargs) -> R:
        for name in named:
            if name not in known:
                raise InputError(f"{function.__name__} has no {name!r}; {_meant(name, known)}")
        return function(*given, **named)

    checked.__signature__ = shown  # type: ignore[attr-defined]
    if shown != own and checked.__doc__:
        checked.__doc__ = f"{inspect.cleandoc(checked.__doc__)}\n\n{_list_of_settings()}"
    return checked


@cache
def _list_of_settings() -> str:
    """All settings with their meanings, one by one."""
    lines = [f"{name}: {meaning}" for name, meaning in meanings().items()]
    return "\n".join(["Settings:", *(fill(line, 110, subsequent_indent="    ") for line in lines)])


def _with_settings(signature: inspect.Signature) -> inspect.Signature:
    """A signature with every setting by name in place of `**settings`, if it has that."""
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    more = parameters() if len(own) < len(signature.parameters) else []
    return signature.replace(parameters=[*own, *more])


def _meant(name: str, known: Sequence[str]) -> str:
    if RENAMED.get(name) in known:
        return f"it is called {RENAMED[name]} here"
    if name in INSTEAD:
        return INSTEAD[name]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"
