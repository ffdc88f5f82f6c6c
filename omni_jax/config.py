"""Hyperparameters of every sub-model, read from a Hugging Face `config.json`.

One frozen dataclass per sub-model; each has `from_hf(dict)`. Nothing else in the project has hyperparameter defaults,
and here there are none either: a key that the checkpoint does not state is an error, because the reference's class
defaults describe another model (3,584 vocabulary rows instead of 152,064). Both ways of writing the rotary base are
read (`rope_theta` with `rope_scaling`, or `rope_parameters`).

Source: transformers `configuration_qwen3_omni_moe.py`.
"""

from dataclasses import dataclass, replace
from math import prod

from omni_jax.errors import ConfigError
from omni_jax.reader import Reader

MODEL_TYPE = "qwen3_omni_moe"
# Codec ids at the end of the Talker's vocabulary that are marks, not sounds.
CODEC_MARKS = 1024


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base and, for multimodal positions, how many frequencies follow time, height and width."""

    theta: float
    mrope_section: tuple[int, int, int] | None

    @classmethod
    def from_hf(cls, r: Reader) -> "RopeConfig":
        scaling = r.values.get("rope_parameters") or r.values.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: rope type {kind!r} in '{r.path}' is not supported; only 'default' is")
        theta = scaling.get("rope_theta", r.values.get("rope_theta"))
        if theta is None:
            raise ConfigError(f"config.json: neither '{r.path}.rope_theta' nor '{r.path}.rope_parameters.rope_theta'")
        section = scaling.get("mrope_section")
        return cls(theta=float(theta), mrope_section=tuple(section) if section else None)


@dataclass(frozen=True)
class DecoderConfig:
    """A causal transformer stack: the Thinker's and Talker's text models, the code predictor, Code2Wav's transformer.

    num_experts: 0 for a stack of plain MLPs. dense_layers: the layers that hold an MLP although the stack has experts.
    shared_expert_intermediate_size: 0 without a shared expert. layer_scale: what a layer adds is scaled by channel.
    sliding_window: keys that a query sees, itself included; None for all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    dense_layers: tuple[int, ...]
    tie_word_embeddings: bool
    qk_norm: bool
    layer_scale: bool
    sliding_window: int | None

    @classmethod
    def from_hf(
        cls, values: dict, path: str = "text_config", *, qk_norm: bool = True, layer_scale: bool = False
    ) -> "DecoderConfig":
        r = Reader(values, path)
        r.expect("attention_bias", False)
        r.expect("hidden_act", "silu")
        r.expect("use_sliding_window", False)
        experts = next((r.count(k) for k in ("num_experts", "num_local_experts") if r.has(k)), 0)
        layers, heads, hidden = r.count("num_hidden_layers"), r.count("num_attention_heads"), r.count("hidden_size")
        config = cls(
            vocab_size=r.count("vocab_size") if r.has("vocab_size") else 0,
            hidden_size=hidden,
            intermediate_size=r.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=r.count("num_key_value_heads"),
            head_dim=r.count("head_dim") if r.has("head_dim") else hidden // heads,
            rms_norm_eps=r.number("rms_norm_eps"),
            rope=RopeConfig.from_hf(r),
            max_position_embeddings=r.count("max_position_embeddings"),
            num_experts=experts,
            experts_per_token=r.count("num_experts_per_tok") if experts else 0,
            moe_intermediate_size=r.count("moe_intermediate_size") if experts else 0,
            shared_expert_intermediate_size=r.values.get("shared_expert_intermediate_size") or 0,
            norm_topk_prob=r.get("norm_topk_prob", bool) if experts else False,
            dense_layers=_dense_layers(r, layers) if experts else tuple(range(layers)),
            tie_word_embeddings=bool(r.values.get("tie_word_embeddings", False)),
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            sliding_window=r.values.get("sliding_window"),
        )
        config._check(path)
        return config

    def _check(self, path: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"config.json: {path}: {self.num_heads} heads do not divide into {self.num_kv_heads}")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f"config.json: {path}: {self.experts_per_token} experts per token of {self.num_experts}")
        if self.rope.mrope_section and sum(self.rope.mrope_section) != self.head_dim // 2:
            section = self.rope.mrope_section
            raise ConfigError(f"config.json: {path}: mrope_section {section} does not sum to {self.head_dim // 2}")


def _dense_layers(r: Reader, layers: int) -> tuple[int, ...]:
    mlp_only, step = r.counts("mlp_only_layers"), r.count("decoder_sparse_step")
    return tuple(i for i in range(layers) if i in mlp_only or (i + 1) % step)


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: one segment per frame, 2-D rotary positions, deepstack taps after `deepstack_layers`."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    deepstack_layers: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Values in one patch row: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, values: dict, path: str = "vision_config") -> "VisionConfig":
        r = Reader(values, path)
        r.expect("hidden_act", "gelu_pytorch_tanh")
        config = cls(
            num_layers=r.count("depth"),
            hidden_size=r.count("hidden_size"),
            num_heads=r.count("num_heads"),
            intermediate_size=r.count("intermediate_size"),
            in_channels=r.count("in_channels"),
            patch_size=r.count("patch_size"),
            temporal_patch_size=r.count("temporal_patch_size"),
            spatial_merge_size=r.count("spatial_merge_size"),
            num_position_embeddings=r.count("num_position_embeddings"),
            out_hidden_size=r.count("out_hidden_size"),
            deepstack_layers=r.counts("deepstack_visual_indexes"),
        )
        if round(config.num_position_embeddings**0.5) ** 2 != config.num_position_embeddings:
            raise ConfigError(f"config.json: {path}.num_position_embeddings is not a square")
        if config.hidden_size % (4 * config.num_heads):
            raise ConfigError(f"config.json: {path}: a head of {config.num_heads} needs a width that 4 divides")
        if any(i < 0 or i >= config.num_layers for i in config.deepstack_layers):
            raise ConfigError(f"config.json: {path}.deepstack_visual_indexes name layers beyond {config.num_layers}")
        return config


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder. `n_window`: half a convolution chunk, in mel frames; `n_window_infer`: an attention window."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    conv_channels: int
    mel_bins: int
    max_source_positions: int
    n_window: int
    n_window_infer: int
    out_hidden_size: int

    @property
    def chunk_frames(self) -> int:
        """Mel frames that the convolutions see at once."""
        return 2 * self.n_window

    @property
    def window_chunks(self) -> int:
        """Chunks that attend to each other."""
        return self.n_window_infer // self.chunk_frames

    @classmethod
    def from_hf(cls, values: dict, path: str = "audio_config") -> "AudioConfig":
        r = Reader(values, path)
        r.expect("activation_function", "gelu")
        config = cls(
            num_layers=r.count("encoder_layers"),
            hidden_size=r.count("d_model"),
            num_heads=r.count("encoder_attention_heads"),
            intermediate_size=r.count("encoder_ffn_dim"),
            conv_channels=r.count("downsample_hidden_size"),
            mel_bins=r.count("num_mel_bins"),
            max_source_positions=r.count("max_source_positions"),
            n_window=r.count("n_window"),
            n_window_infer=r.count("n_window_infer"),
            out_hidden_size=r.count("output_dim"),
        )
        if not 49 <= config.n_window <= 52:
            raise ConfigError(
                f"config.json: {path}.n_window is {config.n_window}; a chunk must give 13 tokens (49 to 52)"
            )
        if config.n_window_infer < config.chunk_frames:
            raise ConfigError(f"config.json: {path}.n_window_infer is shorter than a chunk of {config.chunk_frames}")
        return config


@dataclass(frozen=True)
class ThinkerConfig:
    """The Thinker: text model, both encoders, and the token ids that tie them together."""

    text: DecoderConfig
    vision: VisionConfig
    audio: AudioConfig
    image_token_id: int
    video_token_id: int
    audio_token_id: int
    vision_start_token_id: int
    audio_start_token_id: int
    position_id_per_seconds: float

    @classmethod
    def from_hf(cls, values: dict, path: str = "thinker_config") -> "ThinkerConfig":
        r = Reader(values, path)
        config = cls(
            text=DecoderConfig.from_hf(r.section("text_config").values, f"{path}.text_config"),
            vision=VisionConfig.from_hf(r.section("vision_config").values, f"{path}.vision_config"),
            audio=AudioConfig.from_hf(r.section("audio_config").values, f"{path}.audio_config"),
            image_token_id=r.count("image_token_id"),
            video_token_id=r.count("video_token_id"),
            audio_token_id=r.count("audio_token_id"),
            vision_start_token_id=r.count("vision_start_token_id"),
            audio_start_token_id=r.count("audio_start_token_id"),
            position_id_per_seconds=r.number("position_id_per_seconds"),
        )
        for name, encoder in (("vision", config.vision), ("audio", config.audio)):
            if encoder.out_hidden_size != config.text.hidden_size:
                raise ConfigError(
                    f"config.json: {path}: the {name} encoder gives {encoder.out_hidden_size} values "
                    f"a token, the text model takes {config.text.hidden_size}"
                )
        if config.text.rope.mrope_section is None:
            raise ConfigError(f"config.json: '{path}.text_config.rope_scaling.mrope_section' is missing")
        return config


@dataclass(frozen=True)
class TalkerConfig:
    """The Talker: text model over codec ids, the code predictor, and the ids of its prompt."""

    text: DecoderConfig
    code_predictor: DecoderConfig
    thinker_hidden_size: int
    num_code_groups: int
    accept_hidden_layer: int
    codec_pad_id: int
    codec_bos_id: int
    codec_eos_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    speakers: tuple[tuple[str, int], ...]
    position_id_per_seconds: float

    @classmethod
    def from_hf(cls, values: dict, path: str = "talker_config") -> "TalkerConfig":
        r = Reader(values, path)
        speakers = r.get("speaker_id", dict)
        text = DecoderConfig.from_hf(r.section("text_config").values, f"{path}.text_config")
        return cls(
            # The reference gives every Talker layer experts, whatever mlp_only_layers says.
            text=replace(text, dense_layers=()),
            code_predictor=DecoderConfig.from_hf(
                r.section("code_predictor_config").values, f"{path}.code_predictor_config"
            ),
            thinker_hidden_size=r.count("thinker_hidden_size"),
            num_code_groups=r.count("num_code_groups"),
            accept_hidden_layer=r.count("accept_hidden_layer"),
            codec_pad_id=r.count("codec_pad_id"),
            codec_bos_id=r.count("codec_bos_id"),
            codec_eos_id=r.count("codec_eos_token_id"),
            codec_nothink_id=r.count("codec_nothink_id"),
            codec_think_bos_id=r.count("codec_think_bos_id"),
            codec_think_eos_id=r.count("codec_think_eos_id"),
            speakers=tuple(sorted((str(name), int(i)) for name, i in speakers.items())),
            position_id_per_seconds=r.number("position_id_per_seconds"),
        )


@dataclass(frozen=True)
class Code2WavConfig:
    """The vocoder: a sliding-window transformer over summed code embeddings, then upsampling convolutions."""

    transformer: DecoderConfig
    codebook_size: int
    num_quantizers: int
    decoder_dim: int
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]

    @property
    def sliding_window(self) -> int:
        """Frames that a frame attends to, itself included."""
        assert self.transformer.sliding_window is not None
        return self.transformer.sliding_window

    @property
    def total_upsample(self) -> int:
        """Samples for each frame."""
        return prod((*self.upsampling_ratios, *self.upsample_rates))

    @property
    def lost_samples(self) -> int:
        """Samples by which sound lags behind the codes: F frames give F * total_upsample less these."""
        lost = 0
        for rate in self.upsample_rates:
            lost = (lost + 1) * rate
        return lost

    @classmethod
    def from_hf(cls, values: dict, path: str = "code2wav_config") -> "Code2WavConfig":
        r = Reader(values, path)
        r.count("sliding_window")
        return cls(
            transformer=DecoderConfig.from_hf(values, path, qk_norm=False, layer_scale=True),
            codebook_size=r.count("codebook_size"),
            num_quantizers=r.count("num_quantizers"),
            decoder_dim=r.count("decoder_dim"),
            upsample_rates=r.counts("upsample_rates"),
            upsampling_ratios=r.counts("upsampling_ratios"),
        )


@dataclass(frozen=True)
class OmniConfig:
    """The whole model. `talker` and `code2wav` are None for a checkpoint without speech (no `enable_audio_output`)."""

    thinker: ThinkerConfig
    talker: TalkerConfig | None
    code2wav: Code2WavConfig | None
    im_start_token_id: int
    im_end_token_id: int
    system_token_id: int
    user_token_id: int
    assistant_token_id: int
    tts_pad_token_id: int
    tts_bos_token_id: int
    tts_eos_token_id: int

    @classmethod
    def from_hf(cls, values: dict) -> "OmniConfig":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "")
        if values.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"config.json: model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}")
        speech = r.get("enable_audio_output", bool)
        ids = ("im_start", "im_end", "system", "user", "assistant", "tts_pad", "tts_bos", "tts_eos")
        config = cls(
            thinker=ThinkerConfig.from_hf(r.section("thinker_config").values),
            talker=TalkerConfig.from_hf(r.section("talker_config").values) if speech else None,
            code2wav=Code2WavConfig.from_hf(r.section("code2wav_config").values) if speech else None,
            **{f"{name}_token_id": r.count(f"{name}_token_id") for name in ids},
        )
        if config.talker and config.code2wav:
            _check_speech(config.thinker.text, config.talker, config.code2wav)
        return config


def _check_speech(thinker: DecoderConfig, talker: TalkerConfig, code2wav: Code2WavConfig) -> None:
    """Whether the parts of speech fit each other; each is checked by itself before."""
    predictor, size = talker.code_predictor, code2wav.codebook_size
    for name, stated, fits, expected in (
        ("thinker_hidden_size", talker.thinker_hidden_size, thinker.hidden_size, "the Thinker's width is"),
        ("num_code_groups", talker.num_code_groups, code2wav.num_quantizers, "the vocoder's quantizers are"),
        ("code_predictor_config.hidden_size", predictor.hidden_size, talker.text.hidden_size, "the Talker's width is"),
    ):
        if stated != fits:
            raise ConfigError(f"config.json: talker_config.{name} is {stated}, {expected} {fits}")
    for name, stated, most in (
        ("accept_hidden_layer", talker.accept_hidden_layer, thinker.num_layers),
        ("text_config.vocab_size", talker.text.vocab_size, size + CODEC_MARKS),
        ("code_predictor_config.vocab_size", predictor.vocab_size, size),
    ):
        if stated > most:
            raise ConfigError(f"config.json: talker_config.{name} is {stated}; the rest of the model allows {most}")
