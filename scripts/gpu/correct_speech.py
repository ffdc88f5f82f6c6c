"""Does the device speak as the CPU does? Talker, code predictor and vocoder, small.

Codes may differ where two are about equally likely, and all that follows them then differs too. So networks are
compared on given codes, and codes up to the first near tie.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import CODEC_MARKS, Code2WavConfig, OmniConfig, TalkerConfig
from omni_jax.decode.request import row_keys
from omni_jax.decode.speech.talker_loop import TalkerPrompt, decode_frames, prefill_talker
from omni_jax.decode.speech.vocode import Vocoder, vocode
from omni_jax.decode.speech.voice import speech_plan, speech_values
from omni_jax.decoder_config import RopeConfig
from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import KVCache
from omni_jax.settings import Voice
from scripts.gpu.correct import (
    BFLOAT16,
    LOGITS_FLOAT32,
    Finding,
    compare,
    margins,
    precision,
    random_params,
    root_mean_square,
    same_tokens,
)
from scripts.small.configs import config_dict

# Of the Talker's logits, as in `correct`: a wrong gate of the shared expert costs 0.09.
CODES_BFLOAT16 = 6e-2
ROWS, COLUMNS, HEARD, FRAMES, THINKER = 2, 24, 10, 8, 96
PIECES = (4, 4)


@dataclass(frozen=True)
class Conversation:
    """The inputs of a small Talker: prompt, the Thinker's states [B, U, D], text ids int32 [B, F] of frames."""

    prompt: SpeechPrompt
    hidden: np.ndarray
    text_ids: np.ndarray


def check_talker() -> list[Finding]:
    """A small Talker with its predictor: logits of given codes, and greedy codes, against the CPU."""
    params = random_params(talker_declaration())
    return compared_talkers(params, params)


def compared_talkers(params: dict, others: dict) -> list[Finding]:
    """The Talker with parameters `others` on the device against `params` on the CPU."""
    declaration = talker_declaration()
    cpu, device, said = jax.devices("cpu")[0], jax.devices()[0], conversation()
    embed = np.random.default_rng(6).standard_normal((512, THINKER), np.float32)
    with precision("float32"):
        want_codes = greedy_codes(params, embed, said, declaration, cpu)
        want = teacher_forced(params, embed, said, want_codes, declaration, cpu)
        got = teacher_forced(others, embed, said, want_codes, declaration, device)
        names = ("small Talker logits", "code predictor logits")
        findings = [compare(n, g, w, LOGITS_FLOAT32) for n, g, w in zip(names, got, want, strict=True)]
        got_codes = greedy_codes(others, embed, said, declaration, device)
        sure = np.concatenate([margins(want[0])[..., None], margins(want[1])], axis=-1)
        # In the order of sampling: all codes of a frame, then the next frame.
        drawn, wanted = (codes.transpose(0, 2, 1).reshape(ROWS, -1) for codes in (got_codes, want_codes))
        findings.append(same_tokens("small Talker greedy codes", drawn, wanted, sure.reshape(ROWS, -1)))
        half, other_half, half_embed = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), (params, others, embed))
        wide, wide_embed = jax.tree.map(lambda p: np.asarray(p, np.float32), (half, half_embed))
        want = teacher_forced(wide, wide_embed, said, want_codes, declaration, cpu)
    got = teacher_forced(other_half, half_embed, said, want_codes, declaration, device)
    return findings + [
        root_mean_square(f"{name}, bfloat16, root mean square", g, w, CODES_BFLOAT16)
        for name, g, w in zip(names, got, want, strict=True)
    ]


@cache
def talker_declaration() -> Declaration:
    """The small Talker, one object so that it is compiled once."""
    return declare(Talker, small_talker())


@cache
def vocoder_declaration() -> Declaration:
    """The small vocoder, one object so that it is compiled once."""
    return declare(Code2Wav, small_code2wav())


def small_talker() -> TalkerConfig:
    """The public Talker with few and narrow layers and no end mark."""
    talker = OmniConfig.from_hf(config_dict("full")).talker
    assert talker is not None
    rope, sizes = RopeConfig(theta=1e6, mrope_section=(12, 10, 10)), {"num_layers": 2, "hidden_size": 128}
    text = replace(
        talker.text, **sizes, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=96, num_experts=8,
        experts_per_token=3, moe_intermediate_size=64, shared_expert_intermediate_size=80, rope=rope,
    )  # fmt: skip
    predictor = replace(
        talker.code_predictor, **sizes, dense_layers=(0, 1), num_heads=4, num_kv_heads=2, head_dim=32,
        intermediate_size=96, vocab_size=256,
    )  # fmt: skip
    return replace(
        talker, text=text, code_predictor=predictor, thinker_hidden_size=THINKER, num_code_groups=6, codec_eos_id=-1
    )


def conversation() -> Conversation:
    """Prompts of media, text and codec marks, all of one length."""
    rng = np.random.default_rng(7)
    column = np.broadcast_to(np.arange(COLUMNS, dtype=np.int32), (ROWS, COLUMNS))
    prompt = SpeechPrompt(
        text_ids=rng.integers(0, 512, (ROWS, COLUMNS)).astype(np.int32),
        hidden_index=np.where(column < HEARD, column, -1),
        codec_ids=np.where(column >= COLUMNS - 6, 2100 + column, -1),
        position_ids=np.broadcast_to(column.astype(np.float32), (3, ROWS, COLUMNS)),
        rope_delta=np.zeros(ROWS, np.float32),
        length=np.full(ROWS, COLUMNS, np.int32),
    )
    hidden = rng.standard_normal((ROWS, COLUMNS, THINKER), np.float32)
    return Conversation(prompt, hidden, rng.integers(0, 512, (ROWS, FRAMES)).astype(np.int32))


def greedy_codes(params: dict, embed: Any, said: Conversation, declaration: Declaration, device: Any) -> np.ndarray:
    """Codes int32 [B, Q, FRAMES] by the compiled entry points, on `device`."""
    voice = Voice(speech_temperature=0.0, speech_top_k=0, speech_repetition_penalty=1.0)
    plan, values = speech_plan(voice, small_talker()), speech_values(voice)
    with jax.default_device(device):
        frames = np.full(ROWS, FRAMES, np.int32)
        prompt = TalkerPrompt(said.prompt, frames, row_keys(0, ROWS))
        params, embed, prompt, hidden = jax.device_put((params, embed, prompt, said.hidden), device)
        static = {"declaration": declaration, "plan": plan}
        state = prefill_talker(params, embed, prompt, hidden, values, capacity=64, **static)
        made, _ = decode_frames(params, embed, state, said.text_ids, frames, values, **static)
    return np.asarray(made.codes)


def teacher_forced(
    params: dict, embed: Any, said: Conversation, codes: np.ndarray, declaration: Declaration, device: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of codes int32 [B, Q, N] on `device`: float32 [B, N, V] of the first ones, [B, N, Q - 1, V] of others."""
    with jax.default_device(device):
        given = jax.device_put((params, embed, said.prompt, said.hidden, said.text_ids, codes), device)
        first, others = code_logits(*given, declaration=declaration)
    return np.asarray(first), np.asarray(others)


@partial(jax.jit, static_argnames="declaration")
def code_logits(
    params: dict,
    embed: jax.Array,
    prompt: SpeechPrompt,
    hidden: jax.Array,
    text_ids: jax.Array,
    codes: jax.Array,
    *,
    declaration: Declaration,
) -> tuple[jax.Array, jax.Array]:
    """The logits of given codes, each of the two networks run once over all frames instead of code by code.

    embed [V, D], hidden [B, U, D], text_ids int32 [B, N], codes int32 [B, Q, N]; returns as `teacher_forced`.
    """
    talker: Talker = bind(declaration, params)
    predictor, (B, Q, N) = talker.code_predictor, codes.shape
    heard = talker.hidden_projection(hidden.astype(embed.dtype)[:, :HEARD])
    x = jnp.concatenate([heard, talker.text_projection(embed[jnp.asarray(prompt.text_ids)[:, HEARD:]])], axis=1)
    codec = jnp.asarray(prompt.codec_ids)
    x = x + jnp.where(codec[..., None] >= 0, talker.embed_codes(jnp.maximum(codec, 0)), 0)
    parts = [talker.embed_codes(codes[:, 0]), *(predictor.embed_code(codes[:, i + 1], i) for i in range(Q - 1))]
    said = talker.text_projection(embed[text_ids]) + sum(parts)
    position = jnp.broadcast_to(jnp.arange(COLUMNS + N - 1, dtype=jnp.float32), (3, B, COLUMNS + N - 1))
    states = talker.forward(jnp.concatenate([x, said[:, :-1]], axis=1), position).hidden[:, COLUMNS - 1 :]
    frames = jnp.stack([states, *parts[:-1]], axis=2).reshape(B * N, Q, -1)
    c = predictor.config
    cache = KVCache.empty(c.num_layers, B * N, c.num_kv_heads, Q, c.head_dim, frames.dtype)
    inner = predictor.extend(frames, cache).hidden.reshape(B, N, Q, -1)
    others = jnp.stack([predictor.logits(inner[:, :, i + 1], i) for i in range(Q - 1)], axis=2)
    return talker.logits(states)[..., :-CODEC_MARKS], others


def check_code2wav() -> list[Finding]:
    """A small vocoder, streamed in pieces on the device, against the whole waveform on the CPU."""
    params = random_params(vocoder_declaration())
    return compared_vocoders(params, params)


def compared_vocoders(params: dict, others: dict) -> list[Finding]:
    """The vocoder with parameters `others` on the device against `params` on the CPU."""
    config, declaration = small_code2wav(), vocoder_declaration()
    shape = (ROWS, config.num_quantizers, sum(PIECES))
    codes = np.random.default_rng(8).integers(0, config.codebook_size, shape).astype(np.int32)
    half = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), params)
    with precision("float32"):
        want = whole_wave(params, declaration, config, codes)
        got = streamed_wave(others, declaration, config, codes)
        wide = whole_wave(jax.tree.map(lambda p: np.asarray(p, np.float32), half), declaration, config, codes)
    other_half = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), others)
    rough = streamed_wave(other_half, declaration, config, codes)
    return [
        compare("small Code2Wav waveform", got, want, LOGITS_FLOAT32),
        root_mean_square("small Code2Wav waveform, bfloat16, root mean square", rough, wide, BFLOAT16),
    ]


def small_code2wav() -> Code2WavConfig:
    """The public vocoder, narrow and with few stages, because it takes long to compile."""
    config = OmniConfig.from_hf(config_dict("full")).code2wav
    assert config is not None
    transformer = replace(
        config.transformer, num_layers=2, dense_layers=(0, 1), hidden_size=64, num_heads=2, num_kv_heads=2,
        head_dim=32, intermediate_size=96, sliding_window=5,
    )  # fmt: skip
    return replace(
        config, transformer=transformer, codebook_size=64, num_quantizers=6, decoder_dim=64, upsampling_ratios=(2,),
        upsample_rates=(5, 3),
    )  # fmt: skip


def whole_wave(params: dict, declaration: Declaration, config: Code2WavConfig, codes: np.ndarray) -> np.ndarray:
    """The waveform float32 [B, samples], all frames at once, on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return np.stack(vocode(jax.device_put(params, cpu), declaration, config, codes))


def streamed_wave(params: dict, declaration: Declaration, config: Code2WavConfig, codes: np.ndarray) -> np.ndarray:
    """The waveform float32 [B, samples], in PIECES, on the device."""
    device, pieces = jax.devices()[0], np.split(codes, np.cumsum(PIECES)[:-1], axis=2)
    with jax.default_device(device):
        vocoder = Vocoder(jax.device_put(params, device), declaration, config, rows=codes.shape[0])
        return np.concatenate([*(vocoder.add(piece) for piece in pieces), vocoder.finish()], axis=1)
