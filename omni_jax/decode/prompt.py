"""Prepared conversations on the host: one as a request of its own, a batch padded to a bucket, rows repeated.

Everything here is NumPy; nothing is placed on a device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.settings import Sampling, Voice


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prepared conversation, a batch of one row, with its own seed and limit, and what else it does not share.

    batch: from `Omni.prepare`. seed: of the reply. max_new_tokens: its limit. ends: whether a reply with these token
    ids so far is complete; it is called after every chunk, and a reply may hold tokens after its end that came in the
    same chunk. cancelled: whether nobody waits for the reply any more; it is called between two chunks, of text or of
    speech, and then the reply ends with what it has. Where several processes run a model together, both functions must
    say the same in all of them. speech: whether the reply is also spoken, in a call with speech. speaker: who speaks
    it, by default the speaker of the call. draft: whether tokens are drafted for it, in a call with a drafter.
    sampling: how its tokens are drawn. stop, stop_ids: the texts and the token ids that end it, () for none. voice: how
    it is spoken. These four are by default those of the call.
    """

    batch: Batch
    seed: int
    max_new_tokens: int
    ends: Callable[[list[int]], bool] | None = None
    cancelled: Callable[[], bool] | None = None
    speech: bool = True
    speaker: str | None = None
    draft: bool = True
    sampling: Sampling | None = None
    stop: str | Sequence[str] | None = None
    stop_ids: Sequence[int] | None = None
    voice: Voice | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch, Batch):
            raise InputError(
                f"a prompt takes a prepared batch, not a {type(self.batch).__name__}; use prepare(messages)"
            )
        if len(self.batch.mask) != 1:
            raise InputError(f"a prompt of {len(self.batch.mask)} conversations; give them one by one")


def prompt_lengths(batch: Batch) -> np.ndarray:
    """The number of tokens of each row, int32 [B], padding left out."""
    return batch.mask.sum(axis=1).astype(np.int32)


def has_media(batch: Batch) -> bool:
    """Whether any row holds a picture, a video or a sound."""
    return bool(batch.vision) or batch.audio is not None


def check_context(prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
    """Raise InputError unless a prompt and its reply fit the model's context of `limit` tokens."""
    if prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}: together more than the "
            f"model's context of {limit}; shorten the prompt or its media, or ask for at most "
            f"{max(limit - prompt_tokens, 0)}"
        )


def pad_length(batch: Batch, T: int) -> Batch:
    """The same batch with its rows padded on the right to `T` tokens."""
    more = T - batch.token_ids.shape[1]

    def pad(array: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=fill)

    return replace(
        batch,
        token_ids=pad(batch.token_ids),
        mask=pad(batch.mask),
        position_ids=pad(batch.position_ids),
        visual_index=pad(batch.visual_index, -1),
        audio_index=pad(batch.audio_index, -1),
    )


def repeat_rows(batch: Batch, times: int) -> Batch:
    """The batch with each row `times` times, side by side; the copies read the same media."""
    names = ("token_ids", "mask", "rope_delta", "visual_index", "audio_index")
    rows = {name: np.repeat(getattr(batch, name), times, axis=0) for name in names}
    items = tuple(row for row in batch.items for _ in range(times))
    return replace(batch, position_ids=np.repeat(batch.position_ids, times, axis=1), items=items, **rows)
