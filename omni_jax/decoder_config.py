"""Hyperparameters of a causal transformer stack, as four sub-models and every drafter have one.

Source: transformers `configuration_qwen3_omni_moe.py`. Only the vocoder's stack has a sliding window, whatever the file
states: the reference masks the others without one.
"""

from dataclasses import dataclass
from typing import Annotated

from omni_jax.reader import Heads, LayerIds, Layers, Length, Range, Reader, Vocabulary, Width, shown

MAX_EXPERTS = 500_000  # of all layers together

HeadDim = Annotated[int, Range(1, 10_000)]
Experts = Annotated[int, Range(1, 20_000)]
Maybe = Annotated[int, Range(0, 10**6)]  # 0 for none
Theta = Annotated[float, Range(10, 10**12)]
Sections = Annotated[tuple[int, int, int], Range(1, 10_000)]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base and, for multimodal positions, the frequencies for time, height and width."""

    theta: float
    mrope_section: tuple[int, int, int] | None

    @classmethod
    def from_hf(cls, r: Reader) -> "RopeConfig":
        names = [name for name in ("rope_parameters", "rope_scaling") if r.values.get(name) not in (None, {})]
        scaling = r.section(names[0]) if names else r
        kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
        r.require((kind == "default", f"rope type {shown(kind)} is not supported; only 'default' is"))
        sections = scaling.read("mrope_section", Sections) if scaling.has("mrope_section") else None
        return cls((scaling if scaling.has("rope_theta") else r).read("rope_theta", Theta), sections)


@dataclass(frozen=True)
class DecoderConfig:
    """A causal transformer stack: the Thinker's and Talker's text models, the code predictor, Code2Wav's transformer.

    vocab_size: 0 for a stack without token ids. num_experts: 0 for a stack of plain MLPs. dense_layers: the layers with
    an MLP in a stack of experts. shared_expert_intermediate_size: 0 without a shared expert. layer_scale: whether the
    output of a layer is scaled per channel. sliding_window: how many keys a query sees, its own included; None for all.
    router_aux_loss_coef: what the router's auxiliary loss counts in training. int8_experts: whether the routed experts
    are stored and held in eight bits.
    """

    vocab_size: int
    hidden_size: Width
    intermediate_size: Width
    num_layers: Annotated[Layers, "num_hidden_layers"]
    num_heads: Annotated[Heads, "num_attention_heads"]
    num_kv_heads: Annotated[Heads, "num_key_value_heads"]
    head_dim: int
    rms_norm_eps: Annotated[float, Range(1e-16, 0.1)]
    rope: RopeConfig
    max_position_embeddings: Length
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    dense_layers: tuple[int, ...]
    qk_norm: bool
    layer_scale: bool
    sliding_window: int | None
    router_aux_loss_coef: Annotated[float, Range(0, 1_000)] = 0.001
    int8_experts: bool = False

    @classmethod
    def from_hf(
        cls,
        r: Reader,
        *,
        vocab_size: int | None = None,
        qk_norm: bool = True,
        layer_scale: bool = False,
        sliding_window: int | None = None,
    ) -> "DecoderConfig":
        """`vocab_size`: replaces the section's own. `sliding_window`: for stacks that always have one."""
        for name, supported in (("attention_bias", False), ("hidden_act", "silu"), ("use_sliding_window", False)):
            r.expect(name, supported)
        experts = r.read("num_experts", Maybe, r.read("num_local_experts", Maybe, 0))
        stated, L = r.fields(cls), r.read("num_hidden_layers", Layers)
        config = cls(
            **stated,
            vocab_size=r.read("vocab_size", Vocabulary) if vocab_size is None else vocab_size,
            head_dim=r.read("head_dim", HeadDim, stated["hidden_size"] // stated["num_heads"]),
            rope=RopeConfig.from_hf(r),
            num_experts=experts,
            experts_per_token=r.read("num_experts_per_tok", Experts) if experts else 0,
            moe_intermediate_size=r.read("moe_intermediate_size", Width) if experts else 0,
            shared_expert_intermediate_size=r.read("shared_expert_intermediate_size", Maybe, 0),
            norm_topk_prob=r.get("norm_topk_prob", bool) if experts else False,
            dense_layers=_dense_layers(r, L) if experts else tuple(range(L)),
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            sliding_window=sliding_window,
        )
        config._check(r)
        return config

    def _check(self, r: Reader) -> None:
        N, K, H, E, A = self.num_heads, self.num_kv_heads, self.head_dim, self.num_experts, self.experts_per_token
        section = self.rope.mrope_section
        r.require(
            (N % K == 0, f"{N} attention heads do not divide into {K} key-value heads"),
            (H >= 2 and H % 2 == 0, f"a head of {H} values cannot be rotated in pairs"),
            (section is None or sum(section) == H // 2, f"mrope_section {section} does not sum to {H // 2}"),
            (A <= E, f"{A} experts per token of {E}"),
            (E * self.num_layers <= MAX_EXPERTS, f"more than {MAX_EXPERTS:,} experts in all layers together"),
        )


def _dense_layers(r: Reader, layers: int) -> tuple[int, ...]:
    mlp_only, step = set(r.read("mlp_only_layers", LayerIds)), r.read("decoder_sparse_step", Layers)
    return tuple(i for i in range(layers) if i in mlp_only or (i + 1) % step)
