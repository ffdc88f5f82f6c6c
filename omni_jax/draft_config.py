"""Hyperparameters of the drafters, read from the `config.json` of their public checkpoints.

A drafter reads hidden states of the Thinker. Their numbers are those of the Thinker's `taps` and of `hidden_states` in
transformers: 0 is the embedded input, k the output of decoder layer k - 1 (before its deepstack feature, and after the
final norm for the last). Drafters' files count otherwise, and each in its own way:

    DFlash `target_layer_ids`                        j: output of layer j, our number j + 1
    EAGLE-3 `eagle_config.eagle_aux_hidden_...`      the first is 1: outputs, our j + 1; otherwise inputs, our j
    EAGLE-3 `eagle_aux_hidden_state_layer_ids`       j: input of layer j, our number j

In the last two, we follow the libraries that write these keys (SGLang and SpecForge; vLLM). A number that is off
by one drafts worse and breaks nothing else.

As in `config.py` nothing has a default here, and an option that is not implemented is refused by its name. Multimodal
rotary sections are dropped: drafters rotate by the plain index of a token.

Source: z-lab `DFlashDraftModel`, SpecForge `DFlashDraftModel` (layer types), EAGLE `cnets.Model`.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from omni_jax.decoder_config import DecoderConfig
from omni_jax.errors import ConfigError
from omni_jax.reader import LayerIds, Layers, Length, Range, Reader, is_one_of, shown

FULL, SLIDING = "full_attention", "sliding_attention"
DFLASH = ("DFlashDraftModel",)
EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "EAGLE3LlamaForCausalLM", "LlamaForCausalLM")
EAGLE3_FEATURES = 3
Block = Annotated[int, Range(2, 1_000)]  # tokens: the last one known and at least one draft

# Options of relatives of these drafters, with the values that leave a drafter as it is implemented here. null, false
# and an absent key always do.
DFLASH_OPTIONS: dict[str, tuple[Any, ...]] = {
    "projector_type": (), "selector_rank": (0,), "selector_top_k": (0,), "conv_kernel_size": (0,),
    "conv_group_size": (), "attention_sink_bias": (), "attention_value_scale": (1,), "final_logit_softcapping": (0,),
    "sample_from_anchor": (), "output_multiplier": (1,), "input_embedding_scale": (1,), "attention_mode": ("gqa",),
    "attention_modes": (), "draft_vocab_size": (), "num_experts": (0,), "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
}  # fmt: skip
EAGLE3_OPTIONS: dict[str, tuple[Any, ...]] = {
    "fc_norm": (), "norm_output": (), "norm_before_residual": (), "norm_before_fc": (), "mlp_bias": (), "bias": (),
    "parallel_drafting": (), "logit_scale": (1,), "num_experts": (0,), "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
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
    def from_hf(cls, values: dict, file: str = "config.json") -> "DFlashConfig":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "", file)
        inner = r.section("dflash_config") if r.has("dflash_config") else Reader({}, "dflash_config", file)
        _expect_architecture(r, DFLASH)
        for place in (r, inner):
            _refuse(place, DFLASH_OPTIONS)
        layers = _decoder(r, qk_norm=True)
        target_layers = r.read("num_target_layers", Layers) if r.has("num_target_layers") else None
        types = _layer_types(r, layers.num_layers)
        window = r.read("sliding_window", Length) if SLIDING in types else None
        stated = r.get("is_causal", bool) if r.has("is_causal") else None
        mask = _either(inner, r, "mask_token_id").read("mask_token_id", Annotated[int, Range(0, layers.vocab_size - 1)])
        return cls(
            layers=layers,
            block_size=_either(inner, r, "block_size").read("block_size", Block),
            mask_token_id=mask,
            target_layer_ids=_target_layers(_either(inner, r, "target_layer_ids"), layers.num_layers, target_layers),
            num_target_layers=target_layers,
            windows=tuple(window if kind == SLIDING else None for kind in types),
            causal=tuple(kind == SLIDING if stated is None else stated for kind in types),
        )


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
    def from_hf(cls, values: dict, file: str = "config.json") -> "Eagle3Config":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "", file)
        _expect_architecture(r, EAGLE3)
        _refuse(r, EAGLE3_OPTIONS)
        r.expect("num_hidden_layers", 1)
        r.expect("target_hidden_size", None, values.get("hidden_size"))
        r.expect("use_sliding_window", None, False)
        layer = _decoder(r, qk_norm=False)
        config = cls(
            layer=layer,
            draft_vocab_size=r.read("draft_vocab_size", Annotated[int, Range(1, layer.vocab_size)], layer.vocab_size),
            hidden_states=_hidden_states(r),
        )
        r.expect("num_aux_hidden_states", None, config.features)
        return config


def read_draft_config(values: dict, file: str = "config.json") -> DFlashConfig | Eagle3Config:
    """The configuration of a drafter of either kind; ConfigError, naming `file`, for one that is of neither."""
    names = " ".join(Reader(values, "", file).names("architectures"))
    if "dflash_config" in values or "flash" in names.lower():
        return DFlashConfig.from_hf(values, file)
    if "draft_vocab_size" in values or "eagle" in names.lower():
        return Eagle3Config.from_hf(values, file)
    raise ConfigError(
        f"{file}: architecture {shown(names or 'unknown')} is no drafter that is implemented; "
        "supported: DFlash (with 'dflash_config') and EAGLE-3 (with 'draft_vocab_size')"
    )


def _expect_architecture(r: Reader, supported: tuple[str, ...]) -> None:
    for name in r.names("architectures"):
        if name not in supported:
            raise ConfigError(f"{r.where('architectures')} names {shown(name)}; supported: {list(supported)}")


def _refuse(r: Reader, options: dict[str, tuple[Any, ...]]) -> None:
    for name, neutral in options.items():
        value = r.values.get(name)
        if not is_one_of(value, (None, False, *neutral)):
            raise ConfigError(f"{r.where(name)} is {shown(value)}: this option is not implemented")


def _decoder(r: Reader, qk_norm: bool) -> DecoderConfig:
    """The layers as a plain stack: the drafter handles its windows itself, and positions are plain."""
    section = next((name for name in ("rope_parameters", "rope_scaling") if r.has(name)), None)
    scaling = dict(r.section(section).values) if section else {}
    missing = "'rope_theta' is missing; add the one that the drafter was trained with (files without it mean 10000)"
    r.require((r.has("rope_theta") or scaling.get("rope_theta") is not None, missing))
    plain = {"rope_parameters": {**scaling, "mrope_section": None}, "rope_scaling": None, "use_sliding_window": False}
    plain |= {"num_experts": None, "num_local_experts": None}
    return DecoderConfig.from_hf(Reader({**r.values, **plain}, r.path, r.file), qk_norm=qk_norm)


def _either(inner: Reader, outer: Reader, name: str) -> Reader:
    """The section that has `name`, as in newer files, or the top."""
    return inner if inner.has(name) or not outer.has(name) else outer


def _layer_types(r: Reader, layers: int) -> tuple[str, ...]:
    slides = r.flag("use_sliding_window", absent=False)
    types = r.names("layer_types") if r.has("layer_types") else (FULL,) * layers
    known = len(types) == layers and not set(types) - {FULL, SLIDING}
    r.require(
        (r.has("layer_types") or not slides, "'use_sliding_window' is true; 'layer_types' must say which layers slide"),
        (known, f"'layer_types' must be {FULL!r} or {SLIDING!r} for each of {layers} layers"),
        (slides or SLIDING not in types, "'layer_types' has sliding layers, but 'use_sliding_window' is not true"),
    )
    return types


def _target_layers(r: Reader, layers: int, target_layers: int | None) -> tuple[int, ...]:
    """The stated layers; where a file leaves the choice to its class, one per drafter layer, spread evenly."""
    name = "target_layer_ids"
    if r.has(name):
        return _distinct(r, name, r.read(name, LayerIds), target_layers)
    if target_layers is None:
        raise ConfigError(f"{r.where(name)} is missing, and 'num_target_layers' to derive it from too")
    if layers == 1:
        return (target_layers // 2,)
    # Halves are rounded to even, as the drafters were trained.
    spread = tuple(round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers))
    return _distinct(r, name, spread, target_layers)


def _hidden_states(r: Reader) -> tuple[int, ...] | None:
    name = "eagle_aux_hidden_state_layer_ids"
    if r.has("eagle_config"):
        inner = r.section("eagle_config")
        inner.expect("use_aux_hidden_state", None, True)
        if inner.has(name):
            ids = _distinct(inner, name, inner.read(name, LayerIds))
            return tuple(j + 1 for j in ids) if ids[0] == 1 else ids
    return _distinct(r, name, r.read(name, LayerIds)) if r.has(name) else None


def _distinct(r: Reader, name: str, ids: tuple[int, ...], layers: int | None = None) -> tuple[int, ...]:
    if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or layers is not None and max(ids) >= layers:
        among = "" if layers is None else f" among the {layers} of its model"
        raise ConfigError(f"{r.where(name)} is {shown(list(ids))}; expected different layers{among}, counted from 0")
    return ids
