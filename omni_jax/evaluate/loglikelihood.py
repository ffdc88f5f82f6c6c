"""Log-likelihoods of continuations, as lm-evaluation-harness defines them.

The log-likelihood of a continuation of a context is the sum of the log-probabilities of its tokens, each given all
tokens before it; it is greedy if each of them is the likeliest token at its place. Context and continuation are token
ids: the caller decides where the one ends and the other begins.

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

# Tokens of one forward on a device, padding included, with which its temporary arrays grow: eight rows of 4096, as
# memory is planned elsewhere. A longer row runs alone.
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


def log_likelihoods(
    omni: Omni,
    continuations: Sequence[Continuation],
    *,
    rows: int = 8,
    seen: Callable[[int, Scored], None] = lambda number, scored: None,
) -> list[Scored]:
    """Score every continuation, up to `rows` at a time and fewer if they are long.

    seen: called with the number and the score of each as it is known. InputError for what cannot be scored.
    """
    limit = omni.config.thinker.text.max_position_embeddings
    for one in continuations:
        if not one.context.token_ids.shape[1]:
            raise InputError("a continuation without a context; begin with the token that is put before texts")
        # The last token is predicted and never read.
        check_context(one.context.token_ids.shape[1], len(one.token_ids) - 1, limit)
    results: dict[int, Scored] = {}
    for group, n in _groups(continuations, rows, omni.meshes["thinker"]):
        for number, scored in zip(group, _score(omni, [continuations[i] for i in group], n), strict=True):
            results[number] = scored
            seen(number, scored)
    return [results[i] for i in range(len(continuations))]


def _groups(continuations: Sequence[Continuation], rows: int, mesh: Mesh | None) -> Iterator[tuple[list[int], int]]:
    """Numbers of requests to run together, and in how many rows: of about one length, and those with media alone.

    The number of rows is rounded up to one that the mesh divides: otherwise each device would run all of them.
    """
    shards = round_up_rows(1, mesh)
    order = sorted(range(len(continuations)), key=lambda i: -continuations[i].length)
    plain = [i for i in order if not continuations[i].context.vision and continuations[i].context.audio is None]
    while plain:
        n = round_up_rows(min(rows, max(1, shards * TOKENS // bucket(continuations[plain[0]].length))), mesh)
        yield plain[:n], n
        plain = plain[n:]
    yield from (
        ([i], 1) for i in order if continuations[i].context.vision or continuations[i].context.audio is not None
    )


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
    """Texts as continuations of one context, as ordinary text: literals of control tokens are spelled out."""
    return [Continuation(context, omni.processor.tokenizer.encode_plain(text)) for text in texts]
