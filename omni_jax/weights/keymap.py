"""The key map: the one table between the tensors of a Hugging Face checkpoint and our parameter tree.

A row (`Leaf`) names an array and the tensors that fill it: their names, their places, what is transposed or reshaped.
Shapes and logical axes are those that the modules declare. Everything else follows: which names and shapes a checkpoint
must have, what each conversion step reads and writes, and the way back. Names are those on disk, as `save_pretrained`
writes them; transformers holds some tensors under other names in memory, and those do not belong here.

Arrangements that differ from the disk: layers and experts are stacked along leading axes; query, key and value
projections are one array, for decoders grouped by key-value head so that a group can live on one device; gate and up
projections are one array; routed experts are transposed to [in, out], unless they are in eight bits, and all other
weights keep [out, in].
"""

import numpy as np

from omni_jax.config import Code2WavConfig, DecoderConfig, OmniConfig, TalkerConfig, VisionConfig
from omni_jax.models.code2wav import DILATIONS
from omni_jax.weights.layout import Leaf, Scope, Stack, Stored
from omni_jax.weights.parts import declare_parts, declared_arrays

LAYERS = Stack("l")
# A weight [heads, head dim, in] as [out, in], and [groups, heads of one, head dim, in] likewise.
HEADS, GROUPED_HEADS = (2, 1), (3, 1)


def table(config: OmniConfig) -> list[Leaf]:
    """All rows of a model; a model without speech has no Talker and no Code2Wav rows."""
    roots = {
        part: Scope(declared_arrays(declaration, f"{part}/"), f"{part}.", f"{part}/")
        for part, declaration in declare_parts(config).items()
    }
    rows = _thinker(config, roots["thinker"])
    if config.talker:
        rows += _talker(config.talker, roots["talker"])
    if config.code2wav:
        rows += _code2wav(config.code2wav, roots["code2wav"])
    return rows


def _thinker(config: OmniConfig, root: Scope) -> list[Leaf]:
    return [
        root.leaf("embed", "model.embed_tokens.weight"),
        root.leaf("norm/weight", "model.norm.weight"),
        *([] if config.thinker.tie_word_embeddings else [root.leaf("lm_head", "lm_head.weight")]),
        *decoder(config.thinker.text, root.under("model.", "")),
        *_vision(config.thinker.vision, root.under("visual.", "vision/")),
        *_audio(root.under("audio_tower.", "audio/")),
    ]


def decoder(config: DecoderConfig, root: Scope) -> list[Leaf]:
    """The layers of a causal stack: attention and norms, then experts or a plain MLP, each in its own stack."""
    s = root.under("layers.{l}.", "layers/", LAYERS)
    rows = [
        s.leaf("attention_norm/weight", "input_layernorm.weight"),
        s.leaf("mlp_norm/weight", "post_attention_layernorm.weight"),
        *attention(config, s),
    ]
    if config.qk_norm:
        rows += [s.leaf(f"{x}_norm/weight", f"self_attn.{x}_norm.weight") for x in "qk"]
    sparse = tuple(l for l in range(config.num_layers) if l not in config.dense_layers)
    if config.dense_layers:
        rows += mlp(root.under("layers.{l}.mlp.", "layers/mlp/", Stack("l", tuple(config.dense_layers))))
    if sparse:
        rows += _experts(config, root.under("layers.{l}.mlp.", "layers/", Stack("l", sparse)))
    return rows


def attention(config: DecoderConfig, s: Scope) -> list[Leaf]:
    """A layer's projections: qkv [K, G + 2, H, D], out [D, N, H]."""
    G = config.num_heads // config.num_kv_heads
    return [
        s.leaf(
            "qkv",
            Stored("self_attn.q_proj.weight", np.s_[:, :G], GROUPED_HEADS),
            Stored("self_attn.k_proj.weight", np.s_[:, G], HEADS),
            Stored("self_attn.v_proj.weight", np.s_[:, G + 1], HEADS),
        ),
        s.leaf("out", Stored("self_attn.o_proj.weight", merged=(1, 2))),
    ]


def mlp(s: Scope) -> list[Leaf]:
    """A gated MLP: gate_up [2, F, D], down [D, F]."""
    return [
        s.leaf("gate_up", Stored("gate_proj.weight", (0,)), Stored("up_proj.weight", (1,))),
        s.leaf("down", "down_proj.weight"),
    ]


def _experts(config: DecoderConfig, s: Scope) -> list[Leaf]:
    """Router, routed experts, and the shared expert where the stack has one."""
    e = s.under("experts.{e}.", "moe/", Stack("e"))
    routed = _int8_experts if config.int8_experts else _wide_experts
    rows = [s.leaf("moe/router", "gate.weight"), *routed(config, e)]
    if config.shared_expert_intermediate_size:
        rows += mlp(s.under("shared_expert.", "shared_expert/"))
        # [D], on disk one row [1, D].
        rows.append(s.leaf("shared_expert/gate", Stored("shared_expert_gate.weight", merged=(0, 1))))
    return rows


def _wide_experts(config: DecoderConfig, e: Scope) -> list[Leaf]:
    """An expert, transposed: gate_up [D, 2, F], down [F, D]."""
    gate, up = (Stored(f"{x}_proj.weight", np.s_[:, i], transposed=True) for i, x in enumerate(("gate", "up")))
    return [e.leaf("gate_up", gate, up), e.leaf("down", Stored("down_proj.weight", transposed=True))]


def _int8_experts(config: DecoderConfig, e: Scope) -> list[Leaf]:
    """An expert in eight bits: gate_up [2, F, D], down [D, F]; scales [2, F] and [D], on disk with a last axis of 1."""
    D, F = config.hidden_size, config.moe_intermediate_size
    scales = (Stored(f"{x}_proj.weight_scale", (i,), shape=(F, 1)) for i, x in enumerate(("gate", "up")))
    return [
        e.leaf("gate_up", *(Stored(f"{x}_proj.weight", (i,)) for i, x in enumerate(("gate", "up"))), int8=True),
        e.leaf("gate_up_scale", *scales),
        e.leaf("down", "down_proj.weight", int8=True),
        e.leaf("down_scale", Stored("down_proj.weight_scale", shape=(D, 1))),
    ]


def _vision(c: VisionConfig, root: Scope) -> list[Leaf]:
    s = root.under("blocks.{l}.", "blocks/", LAYERS)
    patch = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    return [
        root.leaf("patch_embed/weight", Stored("patch_embed.proj.weight", shape=patch)),
        root.leaf("patch_embed/bias", "patch_embed.proj.bias"),
        root.leaf("pos_embed", "pos_embed.weight"),
        *s.affine("attention_norm", "norm1"),
        s.leaf("qkv/weight", Stored("attn.qkv.weight", merged=(3, 1))),
        s.leaf("qkv/bias", Stored("attn.qkv.bias", merged=(3,))),
        *s.affine("out", "attn.proj"),
        *s.affine("mlp_norm", "norm2"),
        *s.affine("fc1", "mlp.linear_fc1"),
        *s.affine("fc2", "mlp.linear_fc2"),
        *_merger(root.under("merger.", "merger/")),
        *(_merger(root.under("merger_list.{l}.", "deepstack/", LAYERS)) if c.deepstack_layers else []),
    ]


def _merger(s: Scope) -> list[Leaf]:
    return [*s.affine("norm", "ln_q"), *s.affine("fc1", "mlp.0"), *s.affine("fc2", "mlp.2")]


def _audio(root: Scope) -> list[Leaf]:
    s = root.under("layers.{l}.", "blocks/", LAYERS)
    projections = [f"self_attn.{x}_proj" for x in "qkv"]
    return [
        *(row for i in (1, 2, 3) for row in root.affine(f"conv{i}", f"conv2d{i}")),
        root.leaf("conv_out/weight", "conv_out.weight"),
        *s.affine("attention_norm", "self_attn_layer_norm"),
        s.leaf("qkv/weight", *(Stored(f"{name}.weight", (i,), HEADS) for i, name in enumerate(projections))),
        s.leaf("qkv/bias", *(Stored(f"{name}.bias", (i,), merged=(2,)) for i, name in enumerate(projections))),
        *s.affine("out", "self_attn.out_proj"),
        *s.affine("mlp_norm", "final_layer_norm"),
        *s.affine("fc1", "fc1"),
        *s.affine("fc2", "fc2"),
        *root.affine("post_norm", "ln_post"),
        *root.affine("proj1", "proj1"),
        *root.affine("proj2", "proj2"),
    ]


def _talker(config: TalkerConfig, root: Scope) -> list[Leaf]:
    rows = [
        root.leaf("embed", "model.codec_embedding.weight"),
        root.leaf("norm/weight", "model.norm.weight"),
        root.leaf("codec_head", "codec_head.weight"),
        *decoder(config.text, root.under("model.", "")),
    ]
    for name in ("text_projection", "hidden_projection"):
        s = root.under(f"{name}.", f"{name}/")
        rows += [*s.affine("fc1", "linear_fc1"), *s.affine("fc2", "linear_fc2")]
    s = root.under("code_predictor.", "code_predictor/")
    codebooks = s.under("", "", Stack("i"))
    return rows + [
        codebooks.leaf("embed", "model.codec_embedding.{i}.weight"),
        codebooks.leaf("lm_head", "lm_head.{i}.weight"),
        s.leaf("norm/weight", "model.norm.weight"),
        *decoder(config.code_predictor, s.under("model.", "")),
    ]


def _code2wav(config: Code2WavConfig, root: Scope) -> list[Leaf]:
    s = root.under("pre_transformer.", "")
    scales = s.under("layers.{l}.", "layers/", LAYERS)
    rows = [
        root.leaf("embed", Stored("code_embedding.weight", merged=(2, 1))),
        *decoder(config.transformer, s),
        scales.leaf("attention_scale", "self_attn_layer_scale.scale"),
        scales.leaf("mlp_scale", "mlp_layer_scale.scale"),
        s.leaf("norm/weight", "norm.weight"),
    ]
    for i in range(len(config.upsampling_ratios)):
        rows += _upsample(root.under(f"upsample.{i}.", f"upsample/stage_{i}/"))
    return rows + _wave_decoder(len(config.upsample_rates), root.under("decoder.", "decoder/"))


def _upsample(s: Scope) -> list[Leaf]:
    """A transposed convolution, its weight [in, out, k] as on disk, and a ConvNeXt block."""
    return [
        *s.affine("conv", "0.conv"),
        *s.affine("dwconv", "1.dwconv.conv"),
        *s.affine("norm", "1.norm"),
        *s.affine("fc1", "1.pwconv1"),
        *s.affine("fc2", "1.pwconv2"),
        s.leaf("gamma", "1.gamma"),
    ]


def _wave_decoder(blocks: int, s: Scope) -> list[Leaf]:
    """First convolution, one block for each rate, the last Snake and convolution; all are in one list on disk."""
    rows = s.affine("conv_in", "0.conv")
    for i in range(blocks):
        b = s.under(f"{i + 1}.block.", f"block_{i}/")
        rows += [*_snake(b.under("0.", "")), *b.affine("conv", "1.conv")]
        for j in range(len(DILATIONS)):
            u = b.under(f"{j + 2}.", f"unit_{j}/")
            rows += [*_snake(u.under("act1.", "act1/")), *u.affine("conv1", "conv1.conv")]
            rows += [*_snake(u.under("act2.", "act2/")), *u.affine("conv2", "conv2.conv")]
    return rows + [*_snake(s.under(f"{blocks + 1}.", "")), *s.affine("conv_out", f"{blocks + 2}.conv")]


def _snake(s: Scope) -> list[Leaf]:
    return [s.leaf("alpha", "alpha"), s.leaf("beta", "beta")]
