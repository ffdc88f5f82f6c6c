"""Hyperparameters of every sub-model, read from a Hugging Face `config.json`.

One frozen dataclass per sub-model describes its section: the types of its fields state keys, types and ranges, and
`from_hf` checks relations between the numbers. Nothing else in the project has hyperparameter defaults. Here only
`enable_audio_output` and the token ids at the top of the file have some, those of the reference, which Thinking and
Captioner checkpoints may leave out. Any other key that the checkpoint does not state is an error, because the
reference's class defaults describe another model (3,584 vocabulary rows instead of 152,064). Both ways of writing the
rotary base are read (`rope_theta` with `rope_scaling`, or `rope_parameters`).

Source: transformers `configuration_qwen3_omni_moe.py`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Annotated, Any

from omni_jax.decoder_config import DecoderConfig
from omni_jax.quantization import states_int8_experts
from omni_jax.reader import Heads, LayerIds, Layers, Length, Range, Reader, Size, Vocabulary, Width, is_one_of, shown

MODEL_TYPE = "qwen3_omni_moe"
# Ids at the end of the Talker's vocabulary that are control tokens, not sounds.
CODEC_MARKS = 1024
# Tokens of a chunk of audio, and the values of n_window that give this number.
CHUNK_TOKENS, CHUNK_WINDOWS = 13, range(49, 53)
MAX_UPSAMPLE = 100_000  # samples per frame

TokenId = Annotated[int, Range(0, 10**7)]
Codebooks = Annotated[int, Range(2, 500)]
Rates = Annotated[tuple[int, ...], Range(1, 1_000)]
PositionRate = Annotated[float, Range(0.1, 1_000)]


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: one segment per frame, 2-D rotary positions, deepstack taps after `deepstack_layers`."""

    num_layers: Annotated[Layers, "depth"]
    hidden_size: Width
    num_heads: Heads
    intermediate_size: Width
    in_channels: Annotated[int, Range(3, 3)]
    patch_size: Size
    temporal_patch_size: Size
    spatial_merge_size: Size
    num_position_embeddings: Annotated[int, Range(1, 10**6)]
    out_hidden_size: Width
    deepstack_layers: Annotated[LayerIds, "deepstack_visual_indexes"]

    @property
    def patch_dim(self) -> int:
        """Values in one patch row: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, r: Reader) -> "VisionConfig":
        r.expect("hidden_act", "gelu_pytorch_tanh")
        if r.has("rope_parameters"):
            r.section("rope_parameters").expect("rope_theta", 10_000)
        config = cls(**r.fields(cls))
        L, taps, table = config.num_layers, config.deepstack_layers, config.num_position_embeddings
        divides = config.hidden_size % (4 * config.num_heads) == 0
        r.require(
            (isqrt(table) ** 2 == table, f"num_position_embeddings {table} is not a square"),
            (divides, f"each of {config.num_heads} heads needs a width that 4 divides, of {config.hidden_size}"),
            (all(i < L for i in taps), f"deepstack_visual_indexes {shown(taps)} name layers beyond {L}"),
            (len(set(taps)) == len(taps), f"deepstack_visual_indexes {shown(taps)} name a layer twice"),
        )
        return config


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder. `n_window`: half a convolution chunk, in mel frames; `n_window_infer`: an attention window."""

    num_layers: Annotated[Layers, "encoder_layers"]
    hidden_size: Annotated[Width, "d_model"]
    num_heads: Annotated[Heads, "encoder_attention_heads"]
    intermediate_size: Annotated[Width, "encoder_ffn_dim"]
    conv_channels: Annotated[Width, "downsample_hidden_size"]
    mel_bins: Annotated[int, Range(1, 2_000), "num_mel_bins"]
    max_source_positions: Length
    n_window: Length
    n_window_infer: Length
    out_hidden_size: Annotated[Width, "output_dim"]

    @property
    def chunk_frames(self) -> int:
        """Mel frames that the convolutions see at once."""
        return 2 * self.n_window

    @property
    def window_chunks(self) -> int:
        """Chunks that attend to each other."""
        return self.n_window_infer // self.chunk_frames

    @classmethod
    def from_hf(cls, r: Reader) -> "AudioConfig":
        r.expect("activation_function", "gelu")
        config = cls(**r.fields(cls))
        D, N, half = config.hidden_size, config.num_heads, config.n_window
        tokens = (
            f"n_window is {half}; a chunk must give {CHUNK_TOKENS} tokens ({CHUNK_WINDOWS[0]} to {CHUNK_WINDOWS[-1]})"
        )
        r.require(
            (half in CHUNK_WINDOWS, tokens),
            (config.n_window_infer >= 2 * half, f"n_window_infer is shorter than a chunk of {2 * half}"),
            (config.max_source_positions >= CHUNK_TOKENS, f"max_source_positions is less than {CHUNK_TOKENS}"),
            (D % N == 0, f"a width of {D} does not divide into {N} heads"),
            (D >= 4 and D % 2 == 0, f"a width of {D} has no sinusoidal positions; they need an even one from 4 on"),
        )
        return config


@dataclass(frozen=True)
class ThinkerConfig:
    """The Thinker: text model, both encoders, and the token ids that tie them together."""

    text: DecoderConfig
    vision: VisionConfig
    audio: AudioConfig
    image_token_id: TokenId
    video_token_id: TokenId
    audio_token_id: TokenId
    vision_start_token_id: TokenId
    audio_start_token_id: TokenId
    position_id_per_seconds: PositionRate
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, r: Reader) -> "ThinkerConfig":
        config = cls(
            **r.fields(cls),
            # In the reference this flag of the text section means nothing.
            tie_word_embeddings=r.flag("tie_word_embeddings", absent=False),
            text=DecoderConfig.from_hf(r.section("text_config")),
            vision=VisionConfig.from_hf(r.section("vision_config")),
            audio=AudioConfig.from_hf(r.section("audio_config")),
        )
        text, taps = config.text, len(config.vision.deepstack_layers)
        for name, gives in (("vision", config.vision.out_hidden_size), ("audio", config.audio.out_hidden_size)):
            widths = f"the {name} encoder gives {gives} values a token, the text model takes {text.hidden_size}"
            r.require((gives == text.hidden_size, widths))
        r.require(
            (text.rope.mrope_section is not None, "'text_config.rope_scaling.mrope_section' is missing"),
            (taps <= text.num_layers, f"{taps} deepstack_visual_indexes for a text model of {text.num_layers} layers"),
        )
        return config


@dataclass(frozen=True)
class TalkerConfig:
    """The Talker: text model over codec ids, the code predictor, and the ids of its prompt."""

    text: DecoderConfig
    code_predictor: DecoderConfig
    thinker_hidden_size: Width
    num_code_groups: Codebooks
    accept_hidden_layer: Layers
    codec_pad_id: TokenId
    codec_bos_id: TokenId
    codec_eos_id: Annotated[TokenId, "codec_eos_token_id"]
    codec_nothink_id: TokenId
    codec_think_bos_id: TokenId
    codec_think_eos_id: TokenId
    speakers: tuple[tuple[str, int], ...]
    position_id_per_seconds: PositionRate

    @classmethod
    def from_hf(cls, r: Reader) -> "TalkerConfig":
        predictor = r.section("code_predictor_config")
        config = cls(
            **r.fields(cls),
            # In the reference every Talker layer has experts, whatever mlp_only_layers states.
            text=replace(DecoderConfig.from_hf(r.section("text_config")), dense_layers=()),
            code_predictor=DecoderConfig.from_hf(predictor),
            speakers=_speakers(r.section("speaker_id")),
        )
        sliding = set(predictor.names("layer_types")) - {"full_attention"}
        predictor.require((not sliding, f"layer_types {shown(sorted(sliding))} are not implemented"))
        r.require(
            (config.text.rope.mrope_section is not None, "'text_config.rope_scaling.mrope_section' is missing"),
            (config.text.num_experts > 0, "'text_config.num_experts' is missing, but all layers of a Talker have some"),
        )
        return config


def _speakers(r: Reader) -> tuple[tuple[str, int], ...]:
    """The codec id of each voice, by name; upper and lower case are the same to users."""
    (name, times), *_ = Counter(name.strip().lower() for name in r.values).most_common(1) or [("", 0)]
    r.require(
        (times > 0, "names no voice"),
        (times == 1, f"names the voice {shown(name)} {times} times; case does not count"),
        (all(name.strip() and name.isprintable() for name in r.values), "names a voice that nobody can write"),
    )
    return tuple(sorted((name, r.read(name, Vocabulary)) for name in r.values))


@dataclass(frozen=True)
class Code2WavConfig:
    """The vocoder: a sliding-window transformer over summed code embeddings, then upsampling convolutions."""

    transformer: DecoderConfig
    codebook_size: Annotated[int, Range(1, 10**6)]
    num_quantizers: Codebooks
    decoder_dim: Width
    upsample_rates: Rates
    upsampling_ratios: Rates

    @property
    def sliding_window(self) -> int:
        """How many frames a frame attends to, itself included."""
        assert self.transformer.sliding_window is not None
        return self.transformer.sliding_window

    @property
    def total_upsample(self) -> int:
        """Samples per frame."""
        return prod((*self.upsampling_ratios, *self.upsample_rates))

    @property
    def lost_samples(self) -> int:
        """Samples that are missing at the end: F frames give F * total_upsample minus these."""
        lost = 0
        for rate in self.upsample_rates:
            lost = (lost + 1) * rate
        return lost

    @classmethod
    def from_hf(cls, r: Reader) -> "Code2WavConfig":
        window = r.read("sliding_window", Annotated[int, Range(1, 5_000)])
        transformer = DecoderConfig.from_hf(r, vocab_size=0, qk_norm=False, layer_scale=True, sliding_window=window)
        config = cls(**r.fields(cls), transformer=transformer)
        halves, most = len(config.upsample_rates), f"{MAX_UPSAMPLE:,}"
        r.require(
            (halves > 0, "upsample_rates is an empty list"),
            (len(config.upsampling_ratios) > 0, "upsampling_ratios is an empty list"),
            (config.decoder_dim >> halves > 0, f"decoder_dim {config.decoder_dim} cannot be halved {halves} times"),
            (config.total_upsample <= MAX_UPSAMPLE, f"upsample_rates and ratios give more than {most} samples a frame"),
        )
        return config


@dataclass(frozen=True)
class OmniConfig:
    """The whole model. `talker` and `code2wav` are None for a Thinker alone (`enable_audio_output` is false)."""

    thinker: ThinkerConfig
    talker: TalkerConfig | None
    code2wav: Code2WavConfig | None
    im_start_token_id: TokenId = 151644
    im_end_token_id: TokenId = 151645
    system_token_id: TokenId = 8948
    user_token_id: TokenId = 872
    assistant_token_id: TokenId = 77091
    tts_pad_token_id: TokenId = 151671
    tts_bos_token_id: TokenId = 151672
    tts_eos_token_id: TokenId = 151673

    @property
    def token_ids(self) -> dict[str, int]:
        """Every token id of the file and its defaults, by key."""
        stated = {**vars(self), **vars(self.thinker)}
        return {name: value for name, value in stated.items() if name.endswith("_token_id")}

    @classmethod
    def from_hf(cls, values: dict, file: str = "config.json") -> "OmniConfig":
        """Read a parsed `config.json`; raise ConfigError naming the key that is missing, wrong or unsupported."""
        r = Reader(values, "", file)
        kind = values.get("model_type")
        r.require((kind == MODEL_TYPE, f"model_type is {shown(kind)}, not {MODEL_TYPE!r}"))
        speech = r.flag("enable_audio_output", absent=True)
        lacking = [name for name in ("talker_config", "code2wav_config") if speech and not r.has(name)]
        alone = "a Thinker alone states that enable_audio_output is false"
        r.require((not lacking, f"section {' and '.join(map(repr, lacking))} is missing; {alone}"))
        config = cls(
            **r.fields(cls),
            thinker=ThinkerConfig.from_hf(r.section("thinker_config")),
            talker=TalkerConfig.from_hf(r.section("talker_config")) if speech else None,
            code2wav=Code2WavConfig.from_hf(r.section("code2wav_config")) if speech else None,
        )
        config = config._with_int8_experts() if states_int8_experts(values) else config
        _check_token_ids(r, config)
        if config.talker and config.code2wav:
            _check_speech(r, config.thinker.text, config.talker, config.code2wav)
        return config

    def _with_int8_experts(self) -> "OmniConfig":
        """The same with the routed experts of both text models in eight bits."""

        def held(part: Any) -> Any:
            return replace(part, text=replace(part.text, int8_experts=part.text.num_experts > 0))

        return replace(self, thinker=held(self.thinker), talker=self.talker and held(self.talker))


def _check_token_ids(r: Reader, config: OmniConfig) -> None:
    """Check that all ids are in the Thinker's vocabulary, and that sections which repeat one agree."""
    thinker = config.thinker
    ids = {f"thinker_config.{name}" if hasattr(thinker, name) else name: i for name, i in config.token_ids.items()}
    _check_ids(r, ids.items(), range(thinker.text.vocab_size), "the Thinker's vocabulary")
    for section in ["thinker_config", *(["talker_config"] if config.talker else [])]:
        _check_repeated(r.section(section), config.token_ids)
    if config.talker:
        _check_repeated(r.section("talker_config"), {"spatial_merge_size": thinker.vision.spatial_merge_size})


def _check_repeated(r: Reader, values: dict[str, int]) -> None:
    for name, value in values.items():
        stated = r.values.get(name, value)
        r.require((is_one_of(stated, [value]), f"{name} is {shown(stated)}, but {value} elsewhere in the file"))


def _check_ids(r: Reader, ids: Iterable[tuple[str, int]], allowed: range, of: str) -> None:
    """Check that ids with different meanings differ, and that all are in the range `allowed`, called `of`."""
    taken: dict[int, str] = {}
    for name, i in ids:
        r.require(
            (i in allowed, f"{name} is {i}, outside {of} ({allowed.start} to {allowed.stop - 1})"),
            (i not in taken, f"{name} and {taken.get(i)} are both {i}; each needs an id of its own"),
        )
        taken[i] = name


def _check_speech(r: Reader, thinker: DecoderConfig, talker: TalkerConfig, code2wav: Code2WavConfig) -> None:
    """Check that the parts of speech fit each other; each has been checked alone."""
    predictor, size = talker.code_predictor, code2wav.codebook_size
    for name, stated, fits, expected in (
        ("thinker_hidden_size", talker.thinker_hidden_size, thinker.hidden_size, "the Thinker's width is"),
        ("num_code_groups", talker.num_code_groups, code2wav.num_quantizers, "the vocoder's quantizers are"),
        ("code_predictor_config.hidden_size", predictor.hidden_size, talker.text.hidden_size, "the Talker's width is"),
    ):
        r.require((stated == fits, f"talker_config.{name} is {stated}, {expected} {fits}"))
    for name, stated, most in (
        ("accept_hidden_layer", talker.accept_hidden_layer, thinker.num_layers),
        ("text_config.vocab_size", talker.text.vocab_size, size + CODEC_MARKS),
        ("code_predictor_config.vocab_size", predictor.vocab_size, size),
    ):
        r.require((stated <= most, f"talker_config.{name} is {stated}; the rest of the model allows {most}"))
    _check_repeated(
        r.section("talker_config").section("code_predictor_config"), {"num_code_groups": talker.num_code_groups}
    )
    V = talker.text.vocab_size
    r.require((V > CODEC_MARKS, f"talker_config.text_config.vocab_size is {V}, of which {CODEC_MARKS} are no sounds"))
    marks = [(name.replace("eos_id", "eos_token_id"), i) for name, i in vars(talker).items() if name[:6] == "codec_"]
    # Two names with one id are a voice and its alias.
    voices = {i: f"speaker_id.{name}" for name, i in talker.speakers}
    ids = [*marks, *((name, i) for i, name in voices.items())]
    _check_ids(r.section("talker_config"), ids, range(V - CODEC_MARKS, V), "the ids that are no sounds")
