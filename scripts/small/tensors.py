"""Names and shapes of every tensor of a small checkpoint on disk, under the public names."""

from collections.abc import Iterator

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def tensor_shapes(config: dict) -> dict[str, Shape]:
    """Name and shape of every tensor on disk, in the order of the sub-models."""
    speech = (_talker, _code_predictor, _code2wav) if config["enable_audio_output"] else ()
    return {name: shape for part in (_audio, _vision, _thinker_text, *speech) for name, shape in part(config)}


def _linear(name: str, out: int, inner: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _conv(name: str, *shape: int, out: int | None = None) -> Tensors:
    yield f"{name}.weight", shape
    yield f"{name}.bias", (shape[0] if out is None else out,)


def _audio(config: dict) -> Tensors:
    a, p = config["thinker_config"]["audio_config"], "thinker.audio_tower"
    width, channels, mel = a["d_model"], a["downsample_hidden_size"], a["num_mel_bins"]
    for i, inner in enumerate((1, channels, channels), start=1):
        yield from _conv(f"{p}.conv2d{i}", channels, inner, 3, 3)
        mel = (mel + 1) // 2
    yield from _linear(f"{p}.conv_out", width, channels * mel, bias=False)
    for i in range(a["encoder_layers"]):
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{p}.layers.{i}.self_attn.{proj}", width, width)
        yield from _norm(f"{p}.layers.{i}.self_attn_layer_norm", width)
        yield from _norm(f"{p}.layers.{i}.final_layer_norm", width)
        yield from _linear(f"{p}.layers.{i}.fc1", a["encoder_ffn_dim"], width)
        yield from _linear(f"{p}.layers.{i}.fc2", width, a["encoder_ffn_dim"])
    yield from _norm(f"{p}.ln_post", width)
    yield from _linear(f"{p}.proj1", width, width)
    yield from _linear(f"{p}.proj2", a["output_dim"], width)


def _vision(config: dict) -> Tensors:
    v, p = config["thinker_config"]["vision_config"], "thinker.visual"
    width, patch, merged = v["hidden_size"], v["patch_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    yield from _conv(f"{p}.patch_embed.proj", width, v["in_channels"], v["temporal_patch_size"], patch, patch)
    yield f"{p}.pos_embed.weight", (v["num_position_embeddings"], width)
    for i in range(v["depth"]):
        block = f"{p}.blocks.{i}"
        yield from _norm(f"{block}.norm1", width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.linear_fc1", v["intermediate_size"], width)
        yield from _linear(f"{block}.mlp.linear_fc2", width, v["intermediate_size"])
    taps = [f"{p}.merger_list.{i}" for i in range(len(v["deepstack_visual_indexes"]))]
    for merger, normed in [(f"{p}.merger", width), *((tap, merged) for tap in taps)]:
        yield from _norm(f"{merger}.ln_q", normed)
        yield from _linear(f"{merger}.mlp.0", merged, merged)
        yield from _linear(f"{merger}.mlp.2", v["out_hidden_size"], merged)


def _attention(p: str, c: dict, qk_norm: bool = True) -> Tensors:
    width, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim", width // heads)
    for proj, out in (("q_proj", heads * head), ("k_proj", kv * head), ("v_proj", kv * head)):
        yield from _linear(f"{p}.self_attn.{proj}", out, width, bias=False)
    yield from _linear(f"{p}.self_attn.o_proj", width, heads * head, bias=False)
    if qk_norm:
        yield f"{p}.self_attn.q_norm.weight", (head,)
        yield f"{p}.self_attn.k_norm.weight", (head,)
    yield f"{p}.input_layernorm.weight", (width,)
    yield f"{p}.post_attention_layernorm.weight", (width,)


def _mlp(p: str, width: int, inner: int) -> Tensors:
    yield from _linear(f"{p}.gate_proj", inner, width, bias=False)
    yield from _linear(f"{p}.up_proj", inner, width, bias=False)
    yield from _linear(f"{p}.down_proj", width, inner, bias=False)


def _experts(p: str, c: dict) -> Tensors:
    yield f"{p}.gate.weight", (c["num_experts"], c["hidden_size"])
    for e in range(c["num_experts"]):
        yield from _mlp(f"{p}.experts.{e}", c["hidden_size"], c["moe_intermediate_size"])


def _thinker_text(config: dict) -> Tensors:
    thinker, p = config["thinker_config"], "thinker.model"
    c = thinker["text_config"]
    yield f"{p}.embed_tokens.weight", (c["vocab_size"], c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        yield from _attention(f"{p}.layers.{i}", c)
        if i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]:
            yield from _mlp(f"{p}.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"])
        else:
            yield from _experts(f"{p}.layers.{i}.mlp", c)
    yield f"{p}.norm.weight", (c["hidden_size"],)
    if not thinker.get("tie_word_embeddings"):
        yield "thinker.lm_head.weight", (c["vocab_size"], c["hidden_size"])


def _talker(config: dict) -> Tensors:
    talker, p = config["talker_config"], "talker.model"
    c, outer = talker["text_config"], talker["thinker_hidden_size"]
    width = c["hidden_size"]
    for projection in ("text_projection", "hidden_projection"):
        yield from _linear(f"talker.{projection}.linear_fc1", c["intermediate_size"], outer)
        yield from _linear(f"talker.{projection}.linear_fc2", width, c["intermediate_size"])
    yield f"{p}.codec_embedding.weight", (c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"{p}.layers.{i}"
        yield from _attention(layer, c)
        yield from _experts(f"{layer}.mlp", c)
        yield from _mlp(f"{layer}.mlp.shared_expert", width, c["shared_expert_intermediate_size"])
        yield f"{layer}.mlp.shared_expert_gate.weight", (1, width)
    yield f"{p}.norm.weight", (width,)
    yield "talker.codec_head.weight", (c["vocab_size"], width)


def _code_predictor(config: dict) -> Tensors:
    c, p = config["talker_config"]["code_predictor_config"], "talker.code_predictor"
    for i in range(c["num_code_groups"] - 1):
        yield f"{p}.model.codec_embedding.{i}.weight", (c["vocab_size"], c["hidden_size"])
        yield f"{p}.lm_head.{i}.weight", (c["vocab_size"], c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        yield from _attention(f"{p}.model.layers.{i}", c)
        yield from _mlp(f"{p}.model.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"])
    yield f"{p}.model.norm.weight", (c["hidden_size"],)


def _code2wav(config: dict) -> Tensors:
    c, p = config["code2wav_config"], "code2wav"
    width = c["hidden_size"]
    yield f"{p}.code_embedding.weight", (c["num_quantizers"] * c["codebook_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"{p}.pre_transformer.layers.{i}"
        yield from _attention(layer, c, qk_norm=False)
        yield from _mlp(f"{layer}.mlp", width, c["intermediate_size"])
        yield f"{layer}.self_attn_layer_scale.scale", (width,)
        yield f"{layer}.mlp_layer_scale.scale", (width,)
    yield f"{p}.pre_transformer.norm.weight", (width,)
    for i, factor in enumerate(c["upsampling_ratios"]):
        stage = f"{p}.upsample.{i}"
        yield from _conv(f"{stage}.0.conv", width, width, factor)
        yield from _conv(f"{stage}.1.dwconv.conv", width, 1, 7)
        yield from _norm(f"{stage}.1.norm", width)
        yield from _linear(f"{stage}.1.pwconv1", 4 * width, width)
        yield from _linear(f"{stage}.1.pwconv2", width, 4 * width)
        yield f"{stage}.1.gamma", (width,)
    yield from _waveform_decoder(f"{p}.decoder", c)


def _waveform_decoder(p: str, c: dict) -> Tensors:
    width, rates = c["decoder_dim"], c["upsample_rates"]
    yield from _conv(f"{p}.0.conv", width, c["hidden_size"], 7)
    for i, rate in enumerate(rates, start=1):
        block, inner, width = f"{p}.{i}.block", width, width // 2
        yield from _snake(f"{block}.0", inner)
        yield from _conv(f"{block}.1.conv", inner, width, 2 * rate, out=width)
        for unit in (f"{block}.{j}" for j in (2, 3, 4)):
            yield from _snake(f"{unit}.act1", width)
            yield from _conv(f"{unit}.conv1.conv", width, width, 7)
            yield from _snake(f"{unit}.act2", width)
            yield from _conv(f"{unit}.conv2.conv", width, width, 1)
    yield from _snake(f"{p}.{len(rates) + 1}", width)
    yield from _conv(f"{p}.{len(rates) + 2}.conv", 1, width, 7)


def _snake(p: str, width: int) -> Tensors:
    yield f"{p}.alpha", (width,)
    yield f"{p}.beta", (width,)
