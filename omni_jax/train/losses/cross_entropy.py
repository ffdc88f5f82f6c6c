"""Cross entropy of next tokens, from hidden states: all logits of a batch never exist at once.

    hidden [B, T, D], labels -> a few tokens of every row -> their logits -> sums, and the gradient of these at once

Tokens are taken in turn. A share's logits give its loss and its gradient while they are there, so a backward pass only
scales what is kept: hidden states and head are multiplied three times, not four. Shares without a label are left out.

On a mesh each device takes its own rows and its own part of the vocabulary.

Source: the loss of transformers `ForCausalLMLoss`, as a sum.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from omni_jax.models.param import project
from omni_jax.sharding import split_over
from omni_jax.train.batch import IGNORED

# The most logits that exist at once on a device: 256 MiB in float32.
LOGITS = 1 << 26


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLoss:
    """Sums over the tokens that are learned, float32 []: cross entropy in nats, how many, how many are likeliest."""

    total: jax.Array
    count: jax.Array
    correct: jax.Array


def next_labels(labels: jax.Array, first_seen: jax.Array) -> jax.Array:
    """What each token is to predict: the next one's label int32 [B, T], IGNORED where that starts another sample.

    labels and first_seen: as in `TextBatch`.
    """
    T = labels.shape[1]
    label, first = (jnp.roll(x, -1, axis=1) for x in (labels, first_seen))
    index = jnp.arange(T)
    return jnp.where((index < T - 1) & (first <= index), label, IGNORED)


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, mesh: Mesh | None = None) -> TokenLoss:
    """Cross entropy of hidden states [B, T, D] with targets int32 [B, T], by head [V, D] of their type.

    targets: the id that each state is to predict, IGNORED for none. mesh: the devices, as of `Declaration`. Logits and
    sums are float32; gradients are summed in float32. Only `total` has a gradient.
    """
    if mesh is None or mesh.size == 1:
        sums: Any = _sums(hidden, head, targets, ())
        return TokenLoss(*sums)
    rows, words = split_over("batch", len(hidden), mesh), split_over("vocab", len(head), mesh)

    def local(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        sums: Any = _sums(*arrays, words)
        return tuple(jax.lax.psum(x, rows) for x in sums)

    specs = P(rows or None), P(words or None), P(rows or None)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return TokenLoss(*run(hidden, head, targets))


Sums = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sums(hidden: jax.Array, head: jax.Array, targets: jax.Array, words: tuple[str, ...]) -> Sums:
    """The three sums over a device's own rows; words: the mesh axes over which the vocabulary is split."""

    def share(sums: Sums, rows: jax.Array, targets: jax.Array) -> tuple[Sums, None]:
        return _add(sums, _share(rows, head, targets, words)[0]), None

    return _in_shares(share, (jnp.float32(0),) * 3, hidden, head, targets)[0]


def _sums_and_gradient(hidden: jax.Array, head: jax.Array, targets: jax.Array, words: tuple[str, ...]) -> tuple:
    """The sums, and for the backward pass the gradient of the first of them."""

    def share(carry: Any, rows: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        sums, d_head = carry
        more, d_logits = _share(rows, head, targets, words)
        d_logits = d_logits.astype(rows.dtype)
        d_head += jnp.einsum("RV,RD->VD", d_logits, rows, preferred_element_type=jnp.float32)
        d_rows = jnp.einsum("RV,VD->RD", d_logits, head, preferred_element_type=jnp.float32)
        return (_add(sums, more), d_head), d_rows.astype(rows.dtype)

    start = (jnp.float32(0),) * 3, jnp.zeros(head.shape, jnp.float32)
    (sums, d_head), d_hidden = _in_shares(share, start, hidden, head, targets)
    return sums, (d_hidden, d_head, head[:0])


def _backward(words: tuple[str, ...], kept: tuple, cotangents: Sums) -> tuple:
    d_hidden, d_head, like = kept
    # Every device that shares the vocabulary has a part of the cotangent.
    scale = jax.lax.psum(cotangents[0], words)
    return (scale * d_hidden).astype(d_hidden.dtype), (scale * d_head).astype(like.dtype), None


_sums.defvjp(_sums_and_gradient, _backward)


def _in_shares(share: Any, carry: Any, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    """carry, rows = share(carry, rows [R, D], targets [R]) over a few tokens of every row at a time: carry, [B, T, D].

    `share` may give None for rows. Where no token has a target it is not called, and rows are zero.
    """
    B, T, D = hidden.shape
    size = min(T, max(1, LOGITS // (B * len(head))))
    shares = -(-T // size)

    def cut(x: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, shares * size - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(padded.reshape(B, shares, size, *x.shape[2:]), 1, 0).reshape(shares, -1, *x.shape[2:])

    def step(carry: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        out = jax.eval_shape(share, carry, *at)[1]
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
        # One branch leaves the carry as it is: XLA on CPU copies it where both change it.
        return jax.lax.cond(jnp.any(at[1] != IGNORED), lambda c: share(c, *at), lambda c: (c, none), carry)

    carry, rows = jax.lax.scan(step, carry, (cut(hidden, 0), cut(targets, IGNORED)))
    return carry, jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(shares, B, size, D), 0, 1).reshape(B, -1, D)[:, :T], rows
    )


def _share(rows: jax.Array, head: jax.Array, targets: jax.Array, words: tuple[str, ...]) -> tuple[Sums, jax.Array]:
    """Sums over rows [R, D] with targets int32 [R], and the gradient float32 [R, V] of the cross entropy to logits."""
    V = len(head)
    logits = project(rows, head)
    first = jax.lax.axis_index(words) * V if words else 0
    own, learned = targets[:, None] == first + jnp.arange(V), targets != IGNORED
    best = jax.lax.pmax(jnp.max(logits, axis=1), words)
    exponentials = jnp.exp(logits - best[:, None])
    total = jax.lax.psum(jnp.sum(exponentials, axis=1), words)
    wanted = jax.lax.psum(jnp.sum(jnp.where(own, logits, 0), axis=1), words)
    entropy = jnp.where(learned, jnp.log(total) + best - wanted, 0)
    gradient = jnp.where(learned[:, None], exponentials / total[:, None] - own, 0)
    count, correct = (jnp.sum(x, dtype=jnp.float32) for x in (learned, learned & (wanted >= best)))
    return (jnp.sum(entropy), count, correct), gradient


def _add(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
