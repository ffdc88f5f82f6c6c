"""Low-rank updates of projections as sub-modules: declared beside the weights that they update, trained by themselves.

A stack that is declared with a `LowRankConfig` holds a module `lora` with factors of the projections that it names:

    declare(Thinker, config, LowRankConfig(("q", "v", "experts"), rank=8, scale=4.0))

Source: PEFT `lora.Linear`: A begins uniform, B zero, so that a new update changes nothing.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.models.param import Module, param, project
from omni_jax.ops.low_rank import Factors, GatedFactors
from omni_jax.sharding import Axes

# What can be updated: the projections of attention one by one, all of routed experts, all of plain MLPs and of shared
# experts, and the router.
TARGETS = ("q", "k", "v", "o", "experts", "mlp", "router")


@dataclass(frozen=True)
class LowRankConfig:
    """Which projections have updates, of TARGETS; the rank of the updates; and what they count."""

    targets: tuple[str, ...]
    rank: int
    scale: float


NOTHING = LowRankConfig((), 0, 0.0)


class LowRank(Module):
    """The update of weights [*stack, *out, *in]: factors a [*stack, r, *in] and b [*stack, *out, r]."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: LowRankConfig,
        shape: tuple[int, ...],
        axes: Axes,
        stacked: int = 1,
        contracted: int = 1,
    ):
        """shape, axes: of the weights. stacked, contracted: how many of its axes are layers and the like, and inner."""
        outer, inner = shape[:-contracted], shape[-contracted:]
        bound = prod(inner) ** -0.5
        a = jax.random.uniform(
            rngs.params(), (*shape[:stacked], config.rank, *inner), jnp.float32, minval=-bound, maxval=bound
        )
        self.a = nnx.Param(a, axes=(*axes[:stacked], None, *axes[-contracted:]))
        self.b = param(rngs, (*outer, config.rank), (*axes[:-contracted], None))
        self.scale, self.contracted = config.scale, contracted

    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[..., *in] -> float32 [..., *out] by layer `l` of a stack of layers."""
        inner = project(x, self.a[...][l], self.contracted).astype(x.dtype)
        return self.scale * project(inner, self.b[...][l])

    def factors(self) -> Factors:
        """The arrays, all of the stack."""
        return Factors(self.a[...], self.b[...], self.scale)


class AttentionLowRank(Module):
    """Updates of the projections q, k, v and o of L layers, those that are wanted."""

    def __init__(self, rngs: nnx.Rngs, config: LowRankConfig, width: int, heads: tuple[int, int, int], layers: int):
        """heads: (K, G, H)."""
        (K, G, H), (L, D) = heads, (layers, width)
        wide, narrow = ("layers", "kv_heads", None, "head_dim", "embed"), ("layers", "kv_heads", "head_dim", "embed")
        wanted = config.targets
        self.q = LowRank(rngs, config, (L, K, G, H, D), wide) if "q" in wanted else None
        self.k = LowRank(rngs, config, (L, K, H, D), narrow) if "k" in wanted else None
        self.v = LowRank(rngs, config, (L, K, H, D), narrow) if "v" in wanted else None
        axes = ("layers", "embed", "heads", "head_dim")
        self.o = LowRank(rngs, config, (L, D, K * G, H), axes, contracted=2) if "o" in wanted else None

    def add_qkv(self, qkv: jax.Array, x: jax.Array, l: Any) -> jax.Array:
        """qkv float32 [B, T, K, G + 2, H] of layer `l` with the updates for what it is made of, x [B, T, D]."""
        q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
        q, k, v = add(q, self.q, x, l), add(k, self.k, x, l), add(v, self.v, x, l)
        return jnp.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)


class GatedLowRank(Module):
    """Updates of the matrices of gated MLPs: gate and up [*stack, F, D], down [*stack, D, F]."""

    def __init__(self, rngs: nnx.Rngs, config: LowRankConfig, width: int, inner: int, stack: dict[str, int]):
        """stack: the sizes of the stacked axes by name, layers first."""
        sizes, axes, n = tuple(stack.values()), tuple(stack), len(stack)
        self.gate = LowRank(rngs, config, (*sizes, inner, width), (*axes, "mlp", "embed"), n)
        self.up = LowRank(rngs, config, (*sizes, inner, width), (*axes, "mlp", "embed"), n)
        self.down = LowRank(rngs, config, (*sizes, width, inner), (*axes, "embed", "mlp"), n)

    def factors(self) -> GatedFactors:
        """The arrays, all of the stack."""
        return GatedFactors(self.gate.factors(), self.up.factors(), self.down.factors())


def add(y: jax.Array, update: LowRank | None, x: jax.Array, l: Any) -> jax.Array:
    """y float32 [..., *out] with the update that layer `l` makes of x [..., *in], where there is one."""
    return y if update is None else y + update(x, l)
