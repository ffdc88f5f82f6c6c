"""How fast does the device speak? The Talker's prompt, chunks of whole frames, the vocoder; random weights."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import Code2WavConfig, OmniConfig, TalkerConfig
from omni_jax.decode.request import row_keys
from omni_jax.decode.speech.talker_loop import (
    FRAMES,
    SpeechPlan,
    SpeechState,
    TalkerPrompt,
    decode_frames,
    prefill_talker,
)
from omni_jax.decode.speech.vocode import start, vocode_chunk
from omni_jax.decode.speech.voice import speech_plan, speech_values
from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.models.code2wav import SAMPLES_PER_SECOND, Code2Wav
from omni_jax.models.param import Declaration, declare, init_params
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import capacity_for
from omni_jax.settings import Voice
from scripts.bench.system import require
from scripts.gpu.sizes import frame_name, sound_name, speech_prompt_name
from scripts.gpu.speed import full_cache, profiled, rows_to_go
from scripts.gpu.steps import Profile
from scripts.gpu.timing import Case, Timing, measure_judged, share_of
from scripts.small.configs import config_dict

# The public settings: codes are sampled.
VOICE = Voice()


@dataclass(frozen=True)
class Speaker:
    """Random parameters of a whole Talker on the device, and the Thinker's embeddings [V, D]."""

    config: TalkerConfig
    declaration: Declaration
    params: dict
    embed: jax.Array

    def begin(self, prompt: TalkerPrompt, capacity: int, program: Any = prefill_talker) -> Any:
        """The state after a prompt; or what else `program` makes of the arguments of `prefill_talker`."""
        static = {"declaration": self.declaration, "plan": self.plan, "capacity": capacity}
        return program(self.params, self.embed, prompt, None, speech_values(VOICE), **static)

    def speak(self, state: SpeechState, program: Any = decode_frames) -> Any:
        """The FRAMES frames of one chunk, and the state after it; or as in `begin`."""
        text_ids = np.zeros((state.frames.shape[0], FRAMES), np.int32)
        count = np.full(state.frames.shape, FRAMES, np.int32)
        given = (self.params, self.embed, state, text_ids, count, speech_values(VOICE))
        return program(*given, declaration=self.declaration, plan=self.plan)

    @property
    def plan(self) -> SpeechPlan:
        """The static part of drawing codes."""
        return speech_plan(VOICE, self.config)

    def standing(self, rows: int, capacity: int, new: int) -> SpeechState:
        """A state with room for just `new` more frames in every row, as if long prompts had been read."""
        text, dtype = self.config.text, self.embed.dtype
        return SpeechState(
            cache=full_cache(text, rows, capacity, new, dtype),
            hidden=jax.random.normal(jax.random.key(2), (rows, text.hidden_size), dtype),
            frames=jnp.zeros((rows,), jnp.int32),
            rope_delta=jnp.zeros((rows,), jnp.float32),
            rows=rows_to_go(rows, new, text.vocab_size if self.plan.first.penalised else 0),
        )


def make_speaker(shape: str, dtype: str) -> Speaker:
    """A Talker of configuration `shape` that never ends by itself."""
    config = OmniConfig.from_hf(config_dict(shape))
    assert config.talker is not None
    talker, text = replace(config.talker, codec_eos_id=-1), config.thinker.text
    embed = jax.random.normal(jax.random.key(1), (text.vocab_size, text.hidden_size), jnp.dtype(dtype))
    params = init_params(Talker, talker, dtype=jnp.dtype(dtype))
    return Speaker(talker, declare(Talker, talker), *jax.block_until_ready((params, embed)))


def text_prompt(rows: int, columns: int, frames: int) -> TalkerPrompt:
    """Prompts of text, int32 [rows, columns], with a budget of `frames` frames."""
    prompt = SpeechPrompt(
        text_ids=np.random.default_rng(0).integers(0, 200, (rows, columns)).astype(np.int32),
        hidden_index=np.full((rows, columns), -1, np.int32),
        codec_ids=np.full((rows, columns), -1, np.int32),
        position_ids=np.broadcast_to(np.arange(columns, dtype=np.float32), (3, rows, columns)),
        rope_delta=np.zeros(rows, np.float32),
        length=np.full(rows, columns, np.int32),
    )
    return jax.device_put(TalkerPrompt(prompt, np.full(rows, frames, np.int32), row_keys(0, rows)))


def prompts(speaker: Speaker, columns: int) -> list[Timing]:
    """The prompt of one row, to the first code."""
    prompt, capacity = text_prompt(1, columns, 1), capacity_for(columns)
    share = share_of(speaker.config.text, columns)
    case = Case(speech_prompt_name(columns), 1, columns, "columns/s", share=share)
    lower = partial(speaker.begin, prompt, capacity, prefill_talker.lower)
    return [measure_judged(case, lower, lambda: speaker.begin(prompt, capacity).hidden)]


def frames(speaker: Speaker, rows: int, slots: int) -> list[Timing]:
    """Frames of the Talker with a cache of `slots` slots."""
    case = Case(frame_name(rows), FRAMES, rows, "frames/s", share=share_of(speaker.config.text, rows))
    state = speaker.standing(rows, slots, FRAMES * (case.repetitions + 1))
    lower = partial(speaker.speak, state, decode_frames.lower)

    def run() -> jax.Array:
        nonlocal state
        made, state = speaker.speak(state)
        return made.codes

    timing = measure_judged(case, lower, run)
    require("frames that rows may still make", int(state.rows.remaining.max()), 0)
    return [timing]


def frame_profile(speaker: Speaker, rows: int, slots: int) -> list[Profile]:
    """The kernels that take most time in one chunk of frames."""
    _, state = speaker.speak(speaker.standing(rows, slots, 2 * FRAMES))
    title = f"{FRAMES} times {frame_name(rows)}"
    return [Profile(title, profiled(partial(speaker.speak, jax.block_until_ready(state))))]


@dataclass(frozen=True)
class Vocoder:
    """Random parameters of Code2Wav on the device."""

    config: Code2WavConfig
    declaration: Declaration
    params: dict


def make_vocoder(shape: str, dtype: str) -> Vocoder:
    """The Code2Wav of configuration `shape`."""
    config = OmniConfig.from_hf(config_dict(shape)).code2wav
    assert config is not None
    params = init_params(Code2Wav, config, dtype=jnp.dtype(dtype))
    return Vocoder(config, declare(Code2Wav, config), jax.block_until_ready(params))


def sounds(vocoder: Vocoder, rows: int, count: int) -> list[Timing]:
    """A chunk of the vocoder, `count` frames of `rows` rows."""
    config, declaration, params = vocoder.config, vocoder.declaration, vocoder.params
    drawn = np.random.default_rng(0).integers(0, config.codebook_size, (rows, config.num_quantizers, count))
    codes = jax.device_put(drawn.astype(np.int32))
    state = start(params, rows=rows, declaration=declaration)
    lower = partial(vocode_chunk.lower, params, codes, state, np.int32(count), declaration=declaration)

    def run() -> jax.Array:
        nonlocal state
        wave, state = vocode_chunk(params, codes, state, np.int32(count), declaration=declaration)
        return wave

    seconds = rows * count * config.total_upsample / SAMPLES_PER_SECOND
    return [measure_judged(Case(sound_name(rows, count), 1, seconds, "s of sound/s", repetitions=10), lower, run)]
