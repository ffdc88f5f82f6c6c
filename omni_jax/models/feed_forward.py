"""What follows attention in a decoder layer: an MLP, or routed experts and perhaps a shared one.

Each holds the weights of its layers as a stack, of which a call takes one by its index. Declared with a
`LowRankConfig`, they also hold low-rank updates (`low_rank`).

Source: transformers `Qwen3OmniMoeThinkerTextSparseMoeBlock`, `Qwen3OmniMoeTalkerTextSparseMoeBlock`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.models.low_rank import NOTHING, GatedLowRank, LowRank, LowRankConfig, add
from omni_jax.models.output import ExpertLoad
from omni_jax.models.param import Module, int8_param, param, project
from omni_jax.ops.expert_parallel import sharded_moe, sharded_route
from omni_jax.ops.int8 import Int8
from omni_jax.ops.moe import ExpertWeights, Routing, router_probabilities
from omni_jax.sharding import split_over

# The standard deviation of whole numbers from -127 to 127, all equally often.
INT8_DEVIATION = 73.3


class Experts(Module):
    """Routed experts of L layers: router [L, E, D], gate_up [L, E, D, 2, F], down [L, E, F, D].

    In eight bits as on disk: gate_up int8 [L, E, 2, F, D], down int8 [L, E, D, F], and scales without the last axis.
    """

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig, layers: int, lora: LowRankConfig = NOTHING):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = param(rngs, (layers, E, D), ("layers", None, "embed"), scale=D**-0.5)
        if config.int8_experts:
            gate_up, down = ("layers", "expert", None, "mlp"), ("layers", "expert", "embed")
            self.gate_up = int8_param(rngs, (layers, E, 2, F, D), (*gate_up, "embed"))
            self.gate_up_scale = param(rngs, (layers, E, 2, F), gate_up, fill=D**-0.5 / INT8_DEVIATION)
            self.down = int8_param(rngs, (layers, E, D, F), (*down, "mlp"))
            self.down_scale = param(rngs, (layers, E, D), down, fill=F**-0.5 / INT8_DEVIATION)
        else:
            self.gate_up = param(rngs, (layers, E, D, 2, F), ("layers", "expert", "embed", None, "mlp"), scale=D**-0.5)
            self.down = param(rngs, (layers, E, F, D), ("layers", "expert", "mlp", "embed"), scale=F**-0.5)
        self.config = config
        self.mesh: Mesh | None = None
        stack, routed = {"layers": layers, "expert": E}, ("layers", None, "embed")
        self.lora = GatedLowRank(rngs, lora, D, F, stack) if "experts" in lora.targets else None
        self.router_lora = LowRank(rngs, lora, (layers, E, D), routed) if "router" in lora.targets else None

    @jax.named_scope("experts")
    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D] through the experts of stack index `l`."""
        B, T, D = x.shape
        rows = x.reshape(B * T, D)
        experts = self._weights(l)
        routing, split = self._route(rows, B, l), self._split(B)
        return sharded_moe(rows, routing, experts, self.mesh, split).reshape(B, T, D)

    def _weights(self, l: Any) -> ExpertWeights:
        """The experts of all layers, of which `l` is to be taken."""
        lora = None if self.lora is None else self.lora.factors()
        gate_up, down = self.gate_up[...], self.down[...]
        if self.config.int8_experts:
            gate_up, down = Int8(gate_up, self.gate_up_scale[...]), Int8(down, self.down_scale[...])
        return ExpertWeights(gate_up, down, l, lora)

    def load(self, x: jax.Array, counted: jax.Array, l: Any) -> ExpertLoad:
        """What tokens x [B, T, D] ask of the experts of stack index `l`, summed over those of `counted` bool [B, T]."""
        rows, weight = x.reshape(-1, x.shape[-1]), counted.reshape(-1, 1).astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(self._route(rows, len(x), l).ids, self.config.num_experts), axis=1)
        probabilities = router_probabilities(rows, self._router(l))
        return ExpertLoad(jnp.sum(weight * chosen, axis=0), jnp.sum(weight * probabilities, axis=0))

    @jax.named_scope("router")
    def _route(self, rows: jax.Array, B: int, l: Any) -> Routing:
        """The experts of rows [B * T, D], by the router of stack index `l`."""
        chosen, normalise = self.config.experts_per_token, self.config.norm_topk_prob
        return sharded_route(rows, self._router(l), chosen, normalise, self.mesh, self._split(B))

    def _split(self, B: int) -> tuple[str, ...]:
        """The mesh axes over which B rows of a batch are split."""
        return () if self.mesh is None else split_over("batch", B, self.mesh)

    def _router(self, l: Any) -> jax.Array:
        """The router [E, D] of stack index `l`, with its update, which this small matrix takes up in float32."""
        router = self.router[...][l]
        if self.router_lora is None:
            return router
        a, b = (w[...][l].astype(jnp.float32) for w in (self.router_lora.a, self.router_lora.b))
        return router.astype(jnp.float32) + self.router_lora.scale * (b @ a)


class MLP(Module):
    """Gated MLP of L layers: down(silu(gate(x)) * up(x)); gate_up [L, 2, F, D], down [L, D, F]."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, layers: int, lora: LowRankConfig = NOTHING):
        self.gate_up = param(rngs, (layers, 2, inner, width), ("layers", None, "mlp", "embed"), scale=width**-0.5)
        self.down = param(rngs, (layers, width, inner), ("layers", "embed", "mlp"), scale=inner**-0.5)
        self.lora = GatedLowRank(rngs, lora, width, inner, {"layers": layers}) if "mlp" in lora.targets else None

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D], by layer `l` of the stack."""
        gate, up = jnp.moveaxis(project(x, self.gate_up[...][l]), 2, 0)
        if self.lora is not None:
            gate, up = add(gate, self.lora.gate, x, l), add(up, self.lora.up, x, l)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        out = project(hidden, self.down[...][l])
        return (out if self.lora is None else add(out, self.lora.down, hidden, l)).astype(x.dtype)


class SharedExpert(MLP):
    """A gated MLP for every row, added to the routed experts with weight sigmoid(gate . x); gate [L, D]."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, layers: int, lora: LowRankConfig = NOTHING):
        super().__init__(rngs, width, inner, layers, lora)
        self.gate = param(rngs, (layers, width), ("layers", "embed"), scale=width**-0.5)

    @jax.named_scope("shared_expert")
    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D], by layer `l` of the stack."""
        weight = jax.nn.sigmoid(project(x, self.gate[...][l][None]).astype(x.dtype))
        return weight * super().__call__(x, l)
