"""How fast does the device speak? The Talker's prompt, chunks of whole frames, the vocoder; random weights."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import Code2WavConfig, OmniConfig, TalkerConfig
from omni_jax.decode.request import row_keys
from omni_jax.decode.speech.talker_loop import FRAMES, SpeechState, TalkerPrompt, decode_frames, grow, prefill_talker
from omni_jax.decode.speech.vocode import start, vocode_chunk
from omni_jax.decode.speech.voice import speech_plan, speech_values
from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.models.code2wav import SAMPLES_PER_SECOND, Code2Wav
from omni_jax.models.param import Declaration, declare, init_params
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import capacity_for
from omni_jax.settings import Voice
from scripts.gpu.speed import Timing, measure, profiled
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

    def begin(self, prompt: TalkerPrompt, capacity: int) -> SpeechState:
        static = {"declaration": self.declaration, "plan": speech_plan(VOICE, self.config), "capacity": capacity}
        return prefill_talker(self.params, self.embed, prompt, None, speech_values(VOICE), **static)

    def speak(self, state: SpeechState, unroll: int) -> tuple[jax.Array, SpeechState]:
        """The codes int32 [B, Q, FRAMES] of one chunk, and the state after it."""
        text_ids = np.zeros((state.frames.shape[0], FRAMES), np.int32)
        frames = np.full(state.frames.shape, FRAMES, np.int32)
        given = (self.params, self.embed, state, text_ids, frames, speech_values(VOICE))
        made, state = decode_frames(
            *given, declaration=self.declaration, plan=speech_plan(VOICE, self.config), unroll=unroll
        )
        return made.codes, state

    def said(self, rows: int, capacity: int, frames: int) -> SpeechState:
        """The state after prompts of 128 columns, with `frames` frames left to speak."""
        return grow(self.begin(text_prompt(rows, 128, frames), capacity_for(128)), capacity=capacity)


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


def prompts(speaker: Speaker, cases: Iterable[tuple[int, int]]) -> list[Timing]:
    """Prompts of (rows, columns), to the first code."""
    timings = []
    for rows, columns in cases:
        run = partial(speaker.begin, text_prompt(rows, columns, 1), capacity_for(columns))
        timings.append(measure(f"speech prompt {rows} x {columns}", run, 5, rows * columns, "columns/s"))
    return timings


def frames(speaker: Speaker, rows: int, capacity: int, unroll: int, repetitions: int = 3) -> Timing:
    """Chunks of FRAMES frames in a cache of `capacity` capacity."""
    state = speaker.said(rows, capacity, FRAMES * (repetitions + 1))

    def run() -> jax.Array:
        nonlocal state
        codes, state = speaker.speak(state, unroll)
        return codes

    form = "scan" if unroll == 1 else f"unroll {unroll}"
    name = f"{FRAMES} frames of {rows} rows, {capacity} capacity, {form}"
    timing = measure(name, run, repetitions, rows * FRAMES, "frames/s")
    assert int(state.rows.remaining.max()) == 0, "rows ended early: the rate would be wrong"
    return timing


def frame_kernels(speaker: Speaker, rows: int, capacity: int, unroll: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and calls of the kernels that take most time in one chunk of frames."""
    _, state = speaker.speak(speaker.said(rows, capacity, 2 * FRAMES), unroll)
    return profiled(partial(speaker.speak, jax.block_until_ready(state), unroll))


def sounds(shape: str, dtype: str, cases: Iterable[tuple[int, int]]) -> list[Timing]:
    """Chunks of the vocoder, of (rows, frames)."""
    config = OmniConfig.from_hf(config_dict(shape)).code2wav
    assert config is not None
    declaration, params = declare(Code2Wav, config), init_params(Code2Wav, config, dtype=jnp.dtype(dtype))
    return [_sound(config, declaration, params, rows, count) for rows, count in cases]


def _sound(config: Code2WavConfig, declaration: Declaration, params: dict, rows: int, count: int) -> Timing:
    rng = np.random.default_rng(0)
    codes = jax.device_put(rng.integers(0, config.codebook_size, (rows, config.num_quantizers, count)).astype(np.int32))
    state = start(params, rows=rows, declaration=declaration)

    def run() -> jax.Array:
        nonlocal state
        wave, state = vocode_chunk(params, codes, state, np.int32(count), declaration=declaration)
        return wave

    seconds = rows * count * config.total_upsample / SAMPLES_PER_SECOND
    return measure(f"sound of {rows} x {count} frames", run, 10, seconds, "s of sound/s")
