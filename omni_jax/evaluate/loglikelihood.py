"""Log-likelihoods of continuations, as lm-evaluation-harness defines them.

The log-likelihood of a continuation behind a context is the sum of the log-probabilities of its tokens, each behind all
that stands before it; it is greedy if every one of them is the likeliest token there. Context and continuation are
token ids: who asks decides where the one ends and the other begins.

Requests without media run several at once, the longest first and padded to few lengths; media run alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from omni_jax.decode.log_probs import token_log_probs
from omni_jax.decode.media import encode_media
from omni_jax.decode.prompt import check_context, pad_length
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.omni import Omni
from omni_jax.sharding import round_up_rows

# Tokens of one forward on a device, padding included, with which its temporary arrays grow: eight rows of 4096, with
# which the rest of the package reckons too. A longer row runs alone.
TOKENS = 8 * 4096


class Scored(NamedTuple):
    """A continuation's log-likelihood, whether greedy decoding would write it, and its tokens."""

    log_likelihood: float
    greedy: bool
    tokens: int


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prepared context, a batch of one row without padding, and the ids that follow it."""

    context: Batch
    token_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return self.context.token_ids.shape[1] + len(self.token_ids)

    def whole(self) -> Batch:
        """Context and continuation as one row."""
        context, n = self.context, self.context.token_ids.shape[1]
        longer = pad_length(context, self.length)
        longer.token_ids[0, n:], longer.mask[0, n:] = self.token_ids, True
        longer.position_ids[:, 0, n:] = np.arange(n, self.length) + context.rope_delta[0]
        return longer


def text_context(token_ids: Sequence[int]) -> Batch:
    """A context of plain tokens."""
    ids = np.asarray([token_ids], np.int32)
    B, T = ids.shape
    return Batch(
        token_ids=ids,
        mask=np.ones((B, T), bool),
        position_ids=np.broadcast_to(np.arange(T, dtype=np.float32), (3, B, T)).copy(),
        rope_delta=np.zeros(B, np.float32),
        vision=(),
        visual_index=np.full((B, T), -1, np.int32),
        audio=None,
        audio_index=np.full((B, T), -1, np.int32),
    )


def log_likelihoods(
    omni: Omni,
    asked: Sequence[Continuation],
    *,
    rows: int = 8,
    seen: Callable[[int, Scored], None] = lambda number, scored: None,
) -> list[Scored]:
    """Score every continuation, up to `rows` at a time and fewer if they are long; `seen` is told each as it is known.

    InputError for what cannot be scored.
    """
    limit = omni.config.thinker.text.max_position_embeddings
    for one in asked:
        if not one.context.token_ids.shape[1]:
            raise InputError("a continuation without a context; begin with the token that stands before texts")
        # The last token is predicted, and none behind it.
        check_context(one.context.token_ids.shape[1], len(one.token_ids) - 1, limit)
    results: dict[int, Scored] = {}
    for group, n in _groups(asked, rows, omni.meshes["thinker"]):
        for number, scored in zip(group, _score(omni, [asked[i] for i in group], n), strict=True):
            results[number] = scored
            seen(number, scored)
    return [results[i] for i in range(len(asked))]


def _groups(asked: Sequence[Continuation], rows: int, mesh: Mesh | None) -> Iterator[tuple[list[int], int]]:
    """Numbers of requests to run together, and in how many rows: of about one length, and those with media alone.

    The rows are as many as the mesh divides: each device would run all of them otherwise.
    """
    shards = round_up_rows(1, mesh)
    order = sorted(range(len(asked)), key=lambda i: -asked[i].length)
    plain = [i for i in order if not asked[i].context.vision and asked[i].context.audio is None]
    while plain:
        n = round_up_rows(min(rows, max(1, shards * TOKENS // bucket(asked[plain[0]].length))), mesh)
        yield plain[:n], n
        plain = plain[n:]
    yield from (([i], 1) for i in order if asked[i].context.vision or asked[i].context.audio is not None)


def _score(omni: Omni, group: Sequence[Continuation], rows: int) -> list[Scored]:
    """One forward for requests of which at most one has media."""
    declaration, params = omni.declarations["thinker"], omni.params["thinker"]
    T = bucket(max(one.length for one in group))
    whole = [pad_length(one.whole(), T) for one in group]
    media = encode_media(params, whole[0], declaration)
    # The number of rows is the program's: the last group is filled up with its first request.
    whole += whole[:1] * (rows - len(whole))
    C = bucket(max(1, *(len(one.token_ids) for one in group)))
    at = np.ones((len(whole), C), np.int32)
    for row, one in zip(at, group, strict=False):
        n = len(one.token_ids)
        row[:n] = np.arange(one.length - n, one.length)
    token_ids = np.concatenate([row.token_ids for row in whole])
    position_ids = np.concatenate([row.position_ids for row in whole], axis=1)
    likely, best = (
        np.asarray(x) for x in token_log_probs(params, token_ids, position_ids, at, media, declaration=declaration)
    )
    counts = [len(one.token_ids) for one in group]
    return [
        Scored(float(likely[b, :n].sum(dtype=np.float64)), bool(best[b, :n].all()), n) for b, n in enumerate(counts)
    ]


def prepare_choices(omni: Omni, context: Batch, texts: Sequence[str]) -> list[Continuation]:
    """Texts behind one context, as ordinary text: literals of control tokens are spelled out."""
    return [Continuation(context, omni.processor.tokenizer.encode_plain(text)) for text in texts]
