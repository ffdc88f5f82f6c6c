"""The key map: the one table between the tensors of a Hugging Face checkpoint and our parameter tree.

A row (`Leaf`) names an array of ours, its shape and logical axes, and the tensors that fill it. Everything else follows
from the rows and the configuration: which names and shapes a checkpoint must have, what each conversion step reads and
writes, and the way back. Names are those on disk, as `save_pretrained` writes them; transformers holds some tensors
under other names in memory, and those do not belong here.

Arrangements that differ from the disk: layers and experts are stacked along leading axes; query, key and value
projections are one array, for decoders grouped by key-value head so that a group can live on one device; gate and up
projections are one array; routed experts are transposed to [in, out], all other weights keep [out, in].
"""

from collections.abc import Iterable

import numpy as np

from omni_jax.config import AudioConfig, Code2WavConfig, DecoderConfig, OmniConfig, TalkerConfig, VisionConfig
from omni_jax.weights.checkpoint import nest
from omni_jax.weights.layout import Leaf, Scope, Source, Stack

PARTS = ("thinker", "talker", "code2wav")

# Fixed by the architecture, stated in no configuration.
AUDIO_KERNEL, AUDIO_CONVOLUTIONS = 3, 3
WAVE_KERNEL, NEXT_EXPANSION, RESIDUAL_UNITS = 7, 4, 3


def table(config: OmniConfig) -> list[Leaf]:
    """All rows of a model; a model without speech has no Talker and no Code2Wav rows."""
    rows = [*_thinker(config)]
    if config.talker:
        rows += _talker(config.talker)
    if config.code2wav:
        rows += _code2wav(config.code2wav)
    return [leaf for leaf in rows if 0 not in leaf.shape]


def destination_shapes(config: OmniConfig) -> dict:
    """The parameter tree with a shape for each array."""
    return nest({leaf.path: leaf.shape for leaf in table(config)})


def destination_axes(config: OmniConfig) -> dict:
    """The parameter tree with logical axes for each array."""
    return nest({leaf.path: leaf.axes for leaf in table(config)})


def _layers(count: Iterable[int] | int, letter: str = "l") -> Stack:
    return Stack(letter, "layers", tuple(range(count) if isinstance(count, int) else count))


def _thinker(config: OmniConfig) -> list[Leaf]:
    text, root = config.thinker.text, Scope("thinker.", "thinker/")
    V, D = text.vocab_size, text.hidden_size
    rows = [
        root.leaf("embed", (V, D), ("vocab", "embed"), "model.embed_tokens.weight"),
        root.leaf("norm/weight", (D,), ("embed",), "model.norm.weight"),
    ]
    if not text.tie_word_embeddings:
        rows.append(root.leaf("lm_head", (V, D), ("vocab", "embed"), "lm_head.weight"))
    rows += _decoder(text, root.under("model.", ""))
    rows += _vision(config.thinker.vision, root.under("visual.", "vision/"))
    rows += _audio(config.thinker.audio, root.under("audio_tower.", "audio/"))
    return rows


def _decoder(c: DecoderConfig, root: Scope) -> list[Leaf]:
    """The layers of a causal stack: attention and norms, then experts or a plain MLP, each in its own stack."""
    D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    G = N // K
    s = root.under("layers.{l}.", "layers/", _layers(c.num_layers))
    rows = [
        s.leaf("attention_norm/weight", (D,), ("embed",), "input_layernorm.weight"),
        s.leaf("mlp_norm/weight", (D,), ("embed",), "post_attention_layernorm.weight"),
        s.leaf(
            "qkv",
            (K, G + 2, H, D),
            ("kv_heads", None, "head_dim", "embed"),
            Source("self_attn.q_proj.weight", (N * H, D), at=np.s_[:, :G]),
            Source("self_attn.k_proj.weight", (K * H, D), at=np.s_[:, G]),
            Source("self_attn.v_proj.weight", (K * H, D), at=np.s_[:, G + 1]),
        ),
        s.leaf("out", (D, N, H), ("embed", "heads", "head_dim"), Source("self_attn.o_proj.weight", (D, N * H))),
    ]
    if c.qk_norm:
        rows.append(s.leaf("q_norm/weight", (H,), ("head_dim",), "self_attn.q_norm.weight"))
        rows.append(s.leaf("k_norm/weight", (H,), ("head_dim",), "self_attn.k_norm.weight"))
    sparse = [l for l in range(c.num_layers) if l not in c.dense_layers]
    rows += _mlp(D, c.intermediate_size, root.under("layers.{l}.mlp.", "layers/mlp/", _layers(c.dense_layers)))
    return rows + _experts(c, root.under("layers.{l}.mlp.", "layers/", _layers(sparse)))


def _mlp(D: int, F: int, s: Scope) -> list[Leaf]:
    return [
        s.leaf(
            "gate_up",
            (2, F, D),
            (None, "mlp", "embed"),
            Source("gate_proj.weight", (F, D), at=(0,)),
            Source("up_proj.weight", (F, D), at=(1,)),
        ),
        s.leaf("down", (D, F), ("embed", "mlp"), "down_proj.weight"),
    ]


def _experts(c: DecoderConfig, s: Scope) -> list[Leaf]:
    """Router, routed experts (transposed), and the shared expert where the stack has one."""
    D, E, F = c.hidden_size, c.num_experts, c.moe_intermediate_size
    e = s.under("experts.{e}.", "moe/", Stack("e", "expert", tuple(range(E))))
    rows = [
        s.leaf("moe/router", (E, D), (None, "embed"), "gate.weight"),
        e.leaf(
            "gate_up",
            (D, 2, F),
            ("embed", None, "mlp"),
            Source("gate_proj.weight", (F, D), at=np.s_[:, 0], transposed=True),
            Source("up_proj.weight", (F, D), at=np.s_[:, 1], transposed=True),
        ),
        e.leaf("down", (F, D), ("mlp", "embed"), Source("down_proj.weight", (D, F), transposed=True)),
    ]
    if c.shared_expert_intermediate_size:
        rows += _mlp(D, c.shared_expert_intermediate_size, s.under("shared_expert.", "shared_expert/"))
        rows.append(s.leaf("shared_expert/gate", (D,), ("embed",), Source("shared_expert_gate.weight", (1, D))))
    return rows


def _vision(c: VisionConfig, root: Scope) -> list[Leaf]:
    D, F, N = c.hidden_size, c.intermediate_size, c.num_heads
    s = root.under("blocks.{l}.", "blocks/", _layers(c.num_layers))
    patch = (D, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    group = D * c.spatial_merge_size**2
    deepstack = root.under("merger_list.{l}.", "deepstack/", _layers(len(c.deepstack_layers)))
    return [
        root.leaf("patch_embed/weight", (D, c.patch_dim), ("embed", None), Source("patch_embed.proj.weight", patch)),
        root.leaf("patch_embed/bias", (D,), ("embed",), "patch_embed.proj.bias"),
        root.leaf("pos_embed", (c.num_position_embeddings, D), (None, "embed"), "pos_embed.weight"),
        *s.affine("attention_norm", "norm1", (D,), ("embed",)),
        *_fused(s, D, N, "attn.qkv"),
        *s.affine("out", "attn.proj", (D, D), ("embed", "heads")),
        *s.affine("mlp_norm", "norm2", (D,), ("embed",)),
        *s.affine("fc1", "mlp.linear_fc1", (F, D), ("mlp", "embed")),
        *s.affine("fc2", "mlp.linear_fc2", (D, F), ("embed", "mlp")),
        *_merger(root.under("merger.", "merger/"), D, group, c.out_hidden_size),
        *_merger(deepstack, group, group, c.out_hidden_size),
    ]


def _fused(s: Scope, D: int, N: int, *names: str) -> list[Leaf]:
    """qkv weight [3, N, H, D] and bias [3, N, H] of an encoder, from one fused projection or from three."""
    shape, axes = (3, N, D // N, D), (None, "heads", "head_dim", "embed")
    if len(names) == 1:
        weight, bias = [Source(f"{names[0]}.weight", (3 * D, D))], [Source(f"{names[0]}.bias", (3 * D,))]
    else:
        weight = [Source(f"{name}.weight", (D, D), at=(i,)) for i, name in enumerate(names)]
        bias = [Source(f"{name}.bias", (D,), at=(i,)) for i, name in enumerate(names)]
    return [s.leaf("qkv/weight", shape, axes, *weight), s.leaf("qkv/bias", shape[:3], axes[:3], *bias)]


def _merger(s: Scope, norm: int, group: int, out: int) -> list[Leaf]:
    return [
        *s.affine("norm", "ln_q", (norm,), ("embed",)),
        *s.affine("fc1", "mlp.0", (group, group), ("mlp", "embed")),
        *s.affine("fc2", "mlp.2", (out, group), ("embed", "mlp")),
    ]


def _audio(c: AudioConfig, root: Scope) -> list[Leaf]:
    D, F, C, k = c.hidden_size, c.intermediate_size, c.conv_channels, AUDIO_KERNEL
    s = root.under("layers.{l}.", "blocks/", _layers(c.num_layers))
    bins = c.mel_bins
    for _ in range(AUDIO_CONVOLUTIONS):
        bins = (bins + 1) // 2
    plain = (None,) * 4
    projections = [f"self_attn.{x}_proj" for x in "qkv"]
    return [
        *root.affine("conv1", "conv2d1", (C, 1, k, k), plain),
        *root.affine("conv2", "conv2d2", (C, C, k, k), plain),
        *root.affine("conv3", "conv2d3", (C, C, k, k), plain),
        root.leaf("conv_out/weight", (D, C * bins), ("embed", None), "conv_out.weight"),
        *s.affine("attention_norm", "self_attn_layer_norm", (D,), ("embed",)),
        *_fused(s, D, c.num_heads, *projections),
        *s.affine("out", "self_attn.out_proj", (D, D), ("embed", "heads")),
        *s.affine("mlp_norm", "final_layer_norm", (D,), ("embed",)),
        *s.affine("fc1", "fc1", (F, D), ("mlp", "embed")),
        *s.affine("fc2", "fc2", (D, F), ("embed", "mlp")),
        *root.affine("post_norm", "ln_post", (D,), ("embed",)),
        *root.affine("proj1", "proj1", (D, D), ("mlp", "embed")),
        *root.affine("proj2", "proj2", (c.out_hidden_size, D), ("embed", "mlp")),
    ]


def _talker(c: TalkerConfig) -> list[Leaf]:
    root, vocab = Scope("talker.", "talker/"), ("vocab", "embed")
    V, D, F, X = c.text.vocab_size, c.text.hidden_size, c.text.intermediate_size, c.thinker_hidden_size
    rows = [
        root.leaf("embed", (V, D), vocab, "model.codec_embedding.weight"),
        root.leaf("norm/weight", (D,), ("embed",), "model.norm.weight"),
        root.leaf("codec_head", (V, D), vocab, "codec_head.weight"),
        *_decoder(c.text, root.under("model.", "")),
    ]
    for name in ("text_projection", "hidden_projection"):
        s = root.under(f"{name}.", f"{name}/")
        rows += s.affine("fc1", "linear_fc1", (F, X), ("mlp", "embed"))
        rows += s.affine("fc2", "linear_fc2", (D, F), ("embed", "mlp"))
    p, s = c.code_predictor, root.under("code_predictor.", "code_predictor/")
    codebooks = s.under("", "", Stack("i", None, tuple(range(c.num_code_groups - 1))))
    V, D = p.vocab_size, p.hidden_size
    return rows + [
        codebooks.leaf("embed", (V, D), vocab, "model.codec_embedding.{i}.weight"),
        codebooks.leaf("lm_head", (V, D), vocab, "lm_head.{i}.weight"),
        s.leaf("norm/weight", (D,), ("embed",), "model.norm.weight"),
        *_decoder(p, s.under("model.", "")),
    ]


def _code2wav(c: Code2WavConfig) -> list[Leaf]:
    root, D, Q, C = Scope("code2wav.", "code2wav/"), c.transformer.hidden_size, c.num_quantizers, c.codebook_size
    s = root.under("pre_transformer.", "")
    scales = s.under("layers.{l}.", "layers/", _layers(c.transformer.num_layers))
    rows = [
        root.leaf("embed", (Q, C, D), (None, "vocab", "embed"), Source("code_embedding.weight", (Q * C, D))),
        *_decoder(c.transformer, s),
        scales.leaf("attention_scale", (D,), ("embed",), "self_attn_layer_scale.scale"),
        scales.leaf("mlp_scale", (D,), ("embed",), "mlp_layer_scale.scale"),
        s.leaf("norm/weight", (D,), ("embed",), "norm.weight"),
    ]
    for i, factor in enumerate(c.upsampling_ratios):
        rows += _upsample(root.under(f"upsample.{i}.", f"upsample/stage_{i}/"), D, factor)
    return rows + _wave_decoder(c, root)


def _upsample(s: Scope, D: int, factor: int) -> list[Leaf]:
    """A transposed convolution, its weight [in, out, k] as on disk, and a ConvNeXt block."""
    conv, inner = (None,) * 3, NEXT_EXPANSION * D
    return [
        *s.affine("conv", "0.conv", (D, D, factor), conv),
        *s.affine("dwconv", "1.dwconv.conv", (D, 1, WAVE_KERNEL), conv),
        *s.affine("norm", "1.norm", (D,), ("embed",)),
        *s.affine("fc1", "1.pwconv1", (inner, D), ("mlp", "embed")),
        *s.affine("fc2", "1.pwconv2", (D, inner), ("embed", "mlp")),
        s.leaf("gamma", (D,), ("embed",), "1.gamma"),
    ]


def _wave_decoder(c: Code2WavConfig, root: Scope) -> list[Leaf]:
    """First convolution, one block for each rate (halving the channels), the last Snake and convolution."""
    s, conv, k, last = root.under("decoder.", "decoder/"), (None,) * 3, WAVE_KERNEL, len(c.upsample_rates) + 1
    rows = s.affine("conv_in", "0.conv", (c.decoder_dim, c.transformer.hidden_size, k), conv)
    for i, rate in enumerate(c.upsample_rates):
        channels, out = c.decoder_dim // 2**i, c.decoder_dim // 2 ** (i + 1)
        b = s.under(f"{i + 1}.block.", f"block_{i}/")
        rows += _snake(b.under("0.", ""), channels)
        rows.append(b.leaf("conv/weight", (channels, out, 2 * rate), conv, "1.conv.weight"))
        rows.append(b.leaf("conv/bias", (out,), (None,), "1.conv.bias"))
        for j in range(RESIDUAL_UNITS):
            u = b.under(f"{j + 2}.", f"unit_{j}/")
            rows += _snake(u.under("act1.", "act1/"), out) + u.affine("conv1", "conv1.conv", (out, out, k), conv)
            rows += _snake(u.under("act2.", "act2/"), out) + u.affine("conv2", "conv2.conv", (out, out, 1), conv)
    channels = c.decoder_dim // 2 ** len(c.upsample_rates)
    rows += _snake(s.under(f"{last}.", ""), channels)
    return rows + s.affine("conv_out", f"{last + 1}.conv", (1, channels, k), conv)


def _snake(s: Scope, channels: int) -> list[Leaf]:
    return [s.leaf(name, (channels,), (None,), name) for name in ("alpha", "beta")]
