"""One reply as the host sees it: its limits, the tokens that came, and whether it has ended.

Engines draw tokens for many requests at once and hand each row's tokens to its `Request`; nothing here knows of batches
or devices.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from omni_jax.decode.chunk import ChunkPlan
from omni_jax.decode.limits import Limits, seeds_of
from omni_jax.decode.prompt import prompt_lengths
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import Speaker
from omni_jax.decode.stops import Watch
from omni_jax.decode.text import NO_TOKEN
from omni_jax.inputs.batch import Batch


@dataclass(eq=False)
class Request:
    """One reply.

    prompt_tokens: of its prompt. limits: where it ends. seed: of its draws. sampling: how they are drawn. ends: as in
    `Prompt`. cancels: the prompt's `cancelled`. begins_inside_reasoning: whether its prompt ends with <think>. drafts:
    whether tokens are drafted for it, on an engine that drafts. number: which of the prompts it answers. token_ids:
    drawn so far. speaker: what says it, None for text alone. cancelled: whether `cancel` was called. ended: whether
    `ends` was true. seconds: from `start` until its text was done. given, could_give: tokens that each round of
    drafting gave and could give. verified: tokens that rounds verified.
    """

    prompt_tokens: int
    limits: Limits
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    ends: Callable[[list[int]], bool] | None = None
    cancels: Callable[[], bool] | None = None
    begins_inside_reasoning: bool = False
    drafts: bool = True
    number: int = 0
    token_ids: list[int] = field(default_factory=list)
    speaker: Speaker | None = None
    cancelled: bool = False
    ended: bool = False
    seconds: float = 0.0
    given: list[int] = field(default_factory=list)
    could_give: list[int] = field(default_factory=list)
    verified: int = 0
    _since: float = 0.0
    _reports: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        stops = self.limits.stops
        self.watch: Watch | None = None if stops is None else stops.watch()

    @property
    def max_new_tokens(self) -> int:
        """Its limit."""
        return self.limits.max_new_tokens

    @property
    def logprobs(self) -> int | None:
        """Alternatives to report with each token, None for no log-probabilities."""
        return self.sampling.logprobs

    @property
    def key(self) -> jax.Array:
        """Its random key, from which all its draws follow: a typed key []."""
        return row_keys([self.seed], 1)[0]

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended it, if one has."""
        return None if self.watch is None else self.watch.met

    @property
    def stopped(self) -> bool:
        """Whether it has met a stop id or a stop string, or `ends` has ended it."""
        by_id = bool(self.token_ids) and self.token_ids[-1] in self.limits.stop_ids
        return by_id or self.stop_string is not None or self.ended

    @property
    def done(self) -> bool:
        """Whether it has stopped, reached its limit, or was cancelled."""
        return self.cancelled or self.stopped or len(self.token_ids) >= self.max_new_tokens

    @property
    def complete(self) -> bool:
        """Whether nothing of it is left to do: its text is done, and its speech too, or it was cancelled."""
        return self.cancelled or self.done and (self.speaker is None or self.speaker.done)

    @property
    def spoken(self) -> list[int]:
        """The token ids that speech says: all drawn so far, without the last one of a reply that is done.

        With stop strings, those that no stop string can hold any more.
        """
        if self.watch is not None and (self.watch.met is not None or not self.done):
            return self.token_ids[: self.watch.tokens]
        return self.token_ids[:-1] if self.done else self.token_ids

    def start(self) -> None:
        """Note that work on it begins."""
        self._since = time.perf_counter()

    def ask_whether_cancelled(self) -> None:
        """Cancel it if its prompt says so."""
        if self.cancels is not None and self.cancels():
            self.cancel()

    def cancel(self) -> None:
        """End it. What runs it drops what is drawn from now on, and gives its row to the next request."""
        self.cancelled = True

    def record(self, reports: np.ndarray, plan: ChunkPlan) -> np.ndarray:
        """Take in what a chunk of `plan` drew for it: the tokens that each round gave, int32 [n], without empty rounds.

        reports: int32 [R, E, C], R rounds of up to E tokens as programs report them, -1 where none. Tokens after a stop
        string are dropped.
        """
        emitted = np.sum(reports[..., 0] != NO_TOKEN, axis=1)
        new = reports.reshape(-1, reports.shape[-1])
        new = new[new[:, 0] != NO_TOKEN]
        if self.cancelled:
            new = new[:0]
        if self.watch is not None:
            new = new[: self.watch.add(new[:, 0].tolist())]
        self._reports.append(self._wanted(new))
        self.token_ids += new[:, 0].tolist()
        # Nothing counts that was drawn after a stop string.
        given = np.clip(len(new) - (emitted.cumsum() - emitted), 0, emitted).astype(np.int32)
        given = given[given > 0]
        if plan.verify_tokens is not None and self.drafts:
            self.given += given.tolist()
            self.could_give += [plan.max_emitted] * len(given)
            self.verified += plan.verify_tokens * len(given)
        return given

    def settle(self) -> bool:
        """Ask `ends`, if that is left to decide: whether the request is done. Call it once per read of the device."""
        if not self.done and self.ends is not None and self.ends(self.token_ids):
            self.ended = True
        if self.done:
            self.seconds = time.perf_counter() - self._since
        return self.done

    def _wanted(self, reports: np.ndarray) -> np.ndarray:
        """Of reports int32 [n, C], which may hold more for other rows, what is wanted of this one."""
        if self.logprobs is None:
            return reports[:, :1]
        most = reports.shape[1] // 2 - 1
        k = min(self.logprobs, most)
        return np.concatenate([reports[:, : 2 + k], reports[:, 2 + most : 2 + most + k]], axis=1)

    def reports(self, since: int = 0) -> np.ndarray:
        """What programs reported of its tokens from number `since` on, int32 [n, 2 + 2k], or [n, 1] if only ids.

        k: the alternatives that it wants, see `text.reported`. Only the chunks that hold them are read.
        """
        if not self._reports:
            return np.zeros((0, 1 if self.logprobs is None else 2 + 2 * self.logprobs), np.int32)
        parts, missing = [], len(self.token_ids) - since
        for part in reversed(self._reports):
            parts.append(part)
            missing -= len(part)
            if missing <= 0:
                break
        return np.concatenate(parts[::-1])[-missing:]


def requests_for(batch: Batch, limits: Limits, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Request]:
    """A request for each seed, the same number for each of the batch's prompts, side by side; greedy by default."""
    lengths = prompt_lengths(batch)
    rows = zip(np.repeat(lengths, len(seeds) // len(lengths)).tolist(), seeds, strict=True)
    return [Request(length, limits, seed, sampling or Sampling()) for length, seed in rows]


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """One random key per row, typed [rows]: the same for one seed, so that a row draws alike alone and in a batch.

    seed: one for all rows, or one for each.
    """
    return _keys_of(*np.asarray([divmod(s, 2**32) for s in seeds_of(seed, rows)], np.uint32).T)


@jax.jit
@jax.vmap
def _keys_of(high: jax.Array, low: jax.Array) -> jax.Array:
    """The key of a seed, given by its two halves, uint32 []."""
    return jax.random.fold_in(jax.random.key(low), high)
