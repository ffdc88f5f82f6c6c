"""Hyperparameters of the drafters, read from the `config.json` of their public checkpoints.

A drafter reads hidden states of the Thinker. Their numbers are those of the Thinker's `taps` and of `hidden_states` in
transformers: 0 is the embedded input, k the output of decoder layer k - 1 (before its deepstack feature, and after the
final norm for the last). Drafters' files count otherwise, and each in its own way:

    DFlash `target_layer_ids`                        j: output of layer j, our number j + 1
    EAGLE-3 `eagle_config.eagle_aux_hidden_...`      the first is 1: outputs, our j + 1; otherwise inputs, our j
    EAGLE-3 `eagle_aux_hidden_state_layer_ids`       j: input of layer j, our number j

The last two are what the libraries do that write the respective key (SGLang and SpecForge, vLLM). A number that is off
by one drafts worse and breaks nothing else.

As in `config.py` nothing has a default here, and an option that is not implemented is refused by its name. Multimodal
rotary sections are dropped: drafters turn by the plain index of a token.

Source: z-lab `DFlashDraftModel`, SpecForge `DFlashDraftModel` (layer types), EAGLE `cnets.Model`.
"""

from dataclasses import dataclass
from typing import Any

from omni_jax.config import DecoderConfig
from omni_jax.errors import ConfigError
from omni_jax.reader import Reader

FULL, SLIDING = "full_attention", "sliding_attention"
DFLASH = ("DFlashDraftModel",)
EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "EAGLE3LlamaForCausalLM", "LlamaForCausalLM")
EAGLE3_FEATURES = 3

# Options of relatives of these drafters, with the values that leave a drafter as it is implemented here. null, false
# and an absent key always do.
DFLASH_OPTIONS: dict[str, tuple[Any, ...]] = {
    "projector_type": (), "selector_rank": (0,), "selector_top_k": (0,), "conv_kernel_size": (0,),
    "conv_group_size": (), "attention_sink_bias": (), "attention_value_scale": (1,), "final_logit_softcapping": (0,),
    "sample_from_anchor": (), "output_multiplier": (1,), "input_embedding_scale": (1,), "attention_mode": ("gqa",),
    "attention_modes": (), "draft_vocab_size": (), "num_experts": (0,), "num_local_experts": (0,),
}  # fmt: skip
EAGLE3_OPTIONS: dict[str, tuple[Any, ...]] = {
    "fc_norm": (), "norm_output": (), "norm_before_residual": (), "norm_before_fc": (), "mlp_bias": (), "bias": (),
    "parallel_drafting": (), "logit_scale": (1,), "num_experts": (0,), "num_local_experts": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class DFlashConfig:
    """A block drafter.

    target_layer_ids: Thinker layers whose outputs it reads. windows: keys that a query of each layer sees, itself
    included, None for all. causal: whether a layer's block tokens see only those before them.
    """

    layers: DecoderConfig
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]

    def taps(self, target_layers: int) -> tuple[int, ...]:
        """The numbers of the hidden states that it reads of a Thinker of `target_layers` layers."""
        return tuple(j + 1 for j in self.target_layer_ids)

    @classmethod
    def from_hf(cls, values: dict) -> "DFlashConfig":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "")
        inner = r.section("dflash_config") if r.has("dflash_config") else Reader({}, "dflash_config")
        _expect_architecture(r, DFLASH)
        for place in (r, inner):
            _refuse(place, DFLASH_OPTIONS)
        layers = _decoder(values, qk_norm=True)
        target_layers = r.count("num_target_layers") if r.has("num_target_layers") else None
        types = _layer_types(r, layers.num_layers)
        window = r.count("sliding_window") if SLIDING in types else None
        stated = r.get("is_causal", bool) if r.has("is_causal") else None
        config = cls(
            layers=layers,
            block_size=_either(inner, r, "block_size").count("block_size"),
            mask_token_id=_either(inner, r, "mask_token_id").get("mask_token_id", int),
            target_layer_ids=_target_layers(_either(inner, r, "target_layer_ids"), layers.num_layers, target_layers),
            num_target_layers=target_layers,
            windows=tuple(window if kind == SLIDING else None for kind in types),
            causal=tuple(kind == SLIDING if stated is None else stated for kind in types),
        )
        if config.block_size < 2:
            raise ConfigError("config.json: 'block_size' is 1; a block holds the token at hand and at least one draft")
        return config


@dataclass(frozen=True)
class Eagle3Config:
    """A recurrent drafter of one layer.

    hidden_states: the numbers of the Thinker's hidden states that it reads, None for the usual three.
    """

    layer: DecoderConfig
    draft_vocab_size: int
    hidden_states: tuple[int, ...] | None

    @property
    def features(self) -> int:
        """How many hidden states it reads."""
        return EAGLE3_FEATURES if self.hidden_states is None else len(self.hidden_states)

    def taps(self, target_layers: int) -> tuple[int, ...]:
        """The numbers of the hidden states that it reads of a Thinker of `target_layers` layers."""
        if self.hidden_states is not None:
            return self.hidden_states
        return (2, target_layers // 2, target_layers - 3)

    @classmethod
    def from_hf(cls, values: dict) -> "Eagle3Config":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "")
        _expect_architecture(r, EAGLE3)
        _refuse(r, EAGLE3_OPTIONS)
        r.expect("num_hidden_layers", 1)
        r.expect("target_hidden_size", None, values.get("hidden_size"))
        if r.values.get("use_sliding_window"):
            raise ConfigError("config.json: 'use_sliding_window' is not implemented for this drafter")
        layer = _decoder(values, qk_norm=False)
        config = cls(
            layer=layer,
            draft_vocab_size=r.count("draft_vocab_size") if r.has("draft_vocab_size") else layer.vocab_size,
            hidden_states=_hidden_states(r),
        )
        if config.draft_vocab_size > layer.vocab_size:
            raise ConfigError(f"config.json: 'draft_vocab_size' exceeds the vocabulary of {layer.vocab_size}")
        r.expect("num_aux_hidden_states", None, config.features)
        return config


def read_draft_config(values: dict) -> DFlashConfig | Eagle3Config:
    """The configuration of a drafter of either kind; ConfigError for a file that is of neither."""
    names = " ".join(Reader(values, "").names("architectures"))
    if "dflash_config" in values or "flash" in names.lower():
        return DFlashConfig.from_hf(values)
    if "draft_vocab_size" in values or "eagle" in names.lower():
        return Eagle3Config.from_hf(values)
    raise ConfigError(
        f"config.json: architecture {names or 'unknown'!r} is no drafter that is implemented; "
        "supported: DFlash (with 'dflash_config') and EAGLE-3 (with 'draft_vocab_size')"
    )


def _expect_architecture(r: Reader, supported: tuple[str, ...]) -> None:
    for name in r.names("architectures"):
        if name not in supported:
            raise ConfigError(f"{r.where('architectures')} names {name!r}; supported: {list(supported)}")


def _refuse(r: Reader, options: dict[str, tuple[Any, ...]]) -> None:
    for name, neutral in options.items():
        value = r.values.get(name)
        if value is not None and value is not False and value not in neutral:
            raise ConfigError(f"{r.where(name)} is {value!r}: this option is not implemented")


def _decoder(values: dict, qk_norm: bool) -> DecoderConfig:
    """The layers as a plain stack: windows are the drafter's own affair, and positions are plain."""
    r = Reader(values, "")
    r.count("vocab_size")
    section = next((name for name in ("rope_parameters", "rope_scaling") if r.has(name)), None)
    scaling = dict(r.section(section).values) if section else {}
    if not r.has("rope_theta") and scaling.get("rope_theta") is None:
        raise ConfigError(
            "config.json: 'rope_theta' is missing; add the one that the drafter was trained with (files that leave it "
            "out mean 10000)"
        )
    heads, kv_heads = r.count("num_attention_heads"), r.count("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
    scaling.pop("mrope_section", None)
    plain = {"rope_parameters": scaling, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None}
    return DecoderConfig.from_hf({**values, **plain}, "", qk_norm=qk_norm)


def _either(inner: Reader, outer: Reader, name: str) -> Reader:
    """Where `name` stands: in its section, as newer files have it, or at the top."""
    return inner if inner.has(name) or not outer.has(name) else outer


def _layer_types(r: Reader, layers: int) -> tuple[str, ...]:
    if not r.has("layer_types"):
        if r.values.get("use_sliding_window"):
            raise ConfigError("config.json: 'use_sliding_window' is true; 'layer_types' must say which layers slide")
        return (FULL,) * layers
    types = r.names("layer_types")
    if len(types) != layers or set(types) - {FULL, SLIDING}:
        raise ConfigError(f"config.json: 'layer_types' must be {FULL!r} or {SLIDING!r} for each of {layers} layers")
    if SLIDING in types and not r.values.get("use_sliding_window"):
        raise ConfigError("config.json: 'layer_types' has sliding layers, but 'use_sliding_window' is not true")
    return types


def _target_layers(r: Reader, layers: int, target_layers: int | None) -> tuple[int, ...]:
    """The stated layers, or as many as the drafter has, spread evenly, where a file leaves the choice to its class."""
    if r.has("target_layer_ids"):
        return _distinct(r, "target_layer_ids", r.counts("target_layer_ids"))
    if target_layers is None:
        raise ConfigError(f"{r.where('target_layer_ids')} is missing, and 'num_target_layers' to derive it from too")
    if layers == 1:
        return (target_layers // 2,)
    # Halves are rounded to even, as the drafters were trained.
    spread = tuple(round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers))
    return _distinct(r, "target_layer_ids", spread)


def _hidden_states(r: Reader) -> tuple[int, ...] | None:
    name = "eagle_aux_hidden_state_layer_ids"
    if r.has("eagle_config"):
        inner = r.section("eagle_config")
        if inner.values.get("use_aux_hidden_state") is False:
            raise ConfigError(f"{inner.where('use_aux_hidden_state')} is false: this option is not implemented")
        if inner.has(name):
            ids = _distinct(inner, name, inner.counts(name))
            return tuple(j + 1 for j in ids) if ids[0] == 1 else ids
    return _distinct(r, name, r.counts(name)) if r.has(name) else None


def _distinct(r: Reader, name: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
        raise ConfigError(f"{r.where(name)} is {list(ids)}; expected different layers, counted from 0")
    return ids
