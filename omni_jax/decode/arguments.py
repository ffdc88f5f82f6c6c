"""Arguments of the public functions: names that other libraries use, and their names here.

A call is checked before anything is read, prepared or compiled. What the values may be is checked by `inputs.values`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

from omni_jax.errors import InputError
from omni_jax.weights.drafters import Drafter


class GenerateArguments(TypedDict, total=False):
    """The keywords of `Omni.generate`, `stream` and `generate_many`, all optional.

    max_new_tokens: the most tokens of a reply.
    stop: a text or texts that end a reply, which ends before the first of them.
    stop_ids: token ids that end a reply, by default the end of the assistant's turn.
    temperature, top_k, top_p, min_p, repetition_penalty: how tokens are drawn; temperature 0 is greedy.
    seed: one for all rows or one per row; a row's reply depends on its own seed and prompt alone.
    logprobs: report log-probabilities of the tokens and of this many alternatives to each, 0 to 20.
    use_audio_in_video, tools, fps, media, thinking: as in `Omni.prepare`.
    speech: whether the replies are also spoken.
    speaker: who speaks them, one for all rows or one per row.
    speech_temperature, speech_top_k, speech_top_p: how codes are drawn.
    speech_repetition_penalty: on earlier codes, also when greedy.
    max_frames: the most frames of speech, of 80 ms each.
    drafter: drafts tokens that the model then verifies. It changes the time and nothing else.
    draft_tokens: drafted per round, by default the number that the drafter was trained for; "auto" measures once what
        rounds take, and follows what is accepted.
    draft_tree: levels and candidates of a tree that an EAGLE-3 drafter proposes, (7, 10) by its authors.
    draft_sampling: draw drafts too: at high temperatures more of them are accepted, and the reply is another one from
        the same distribution.
    """

    max_new_tokens: int
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]
    logprobs: int | None
    use_audio_in_video: bool
    tools: list[dict] | None
    fps: float | None
    media: Mapping[str, Any] | None
    thinking: bool | None
    speech: bool
    speaker: str | Sequence[str]
    speech_temperature: float
    speech_top_k: int
    speech_top_p: float
    speech_repetition_penalty: float
    max_frames: int
    drafter: Drafter | None
    draft_tokens: int | Literal["auto"] | None
    draft_tree: tuple[int, int] | None
    draft_sampling: bool


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
