"""Measure speech: Talker with code predictor, Code2Wav, time to the first audio, a whole spoken reply.

Both systems answer the same prompts with the same number of tokens and speak `frames` frames; end marks cannot be
sampled. Text is greedy; codes are sampled with the public settings (temperature 0.9, top-k 50, penalty 1.05; residual
codes top-k 50, top-p 0.8), or greedily if asked. One repetition has four parts:

- The whole reply from a prepared batch, text and sound. Ours is streamed as `Omni.stream` does it, all rows together:
  the time to the first audio is that to the first samples on the host. Transformers does not stream: its first audio
  is there when the reply is complete, so this figure grows with the reply.
- The Talker by itself, for a finished reply, for one frame (its prompt and the first frame) and for all frames. Frames
  per second, of all rows, are those after the first.
- Code2Wav by itself, for the codes of all frames: ours by `vocode`, theirs by `chunked_decode(300, 25)`.

Real-time factors are seconds of computing per second of sound, the sound of all rows together.
"""

from pathlib import Path
from typing import Any

from omni_jax.config import OmniConfig
from scripts.bench.compare import Row
from scripts.bench.options import Speech
from scripts.bench.system import System, our_system, their_system
from scripts.small.configs import config_dict

ROWS: tuple[Row, ...] = (
    ("talker, frames/s", "frames_per_second", 1.0, ".1f"),
    ("talker to first frame, ms", "time_to_first_frame", 1e3, ".1f"),
    ("talker, real-time factor", "talker_factor", 1.0, ".4f"),
    ("code2wav, s", "code2wav_seconds", 1.0, ".3f"),
    ("code2wav, real-time factor", "code2wav_factor", 1.0, ".4f"),
    ("both, real-time factor", "speech_factor", 1.0, ".4f"),
    ("time to first audio, s", "time_to_first_audio", 1.0, ".3f"),
    ("whole reply, s", "reply_seconds", 1.0, ".3f"),
)


def title(options: Speech) -> str:
    """What was measured, in one line."""
    codes = "greedy" if options.greedy else "sampled"
    sizes = f"batch {options.batch}, prompt {options.prompt}, new {options.new}, frames {options.frames}"
    held = f"{options.run.dtype}{', our experts in int8' if options.run.quantize else ''}"
    return f"speech, {options.run.shape}, {held}, {sizes}, {codes}"


def figures(options: Speech, seconds: dict[str, float]) -> dict[str, float]:
    """Figures from the median seconds of the parts."""
    from omni_jax.models.code2wav import SAMPLES_PER_SECOND

    code2wav: Any = OmniConfig.from_hf(config_dict(options.run.shape)).code2wav
    sound = options.batch * options.frames * code2wav.total_upsample / SAMPLES_PER_SECOND
    talker = seconds["first_frame"] + seconds["other_frames"]
    return {
        "frames_per_second": options.batch * (options.frames - 1) / seconds["other_frames"],
        "time_to_first_frame": seconds["first_frame"],
        "talker_factor": talker / sound,
        "code2wav_seconds": seconds["code2wav"],
        "code2wav_factor": seconds["code2wav"] / sound,
        "speech_factor": (talker + seconds["code2wav"]) / sound,
        "time_to_first_audio": seconds["first_audio"],
        "reply_seconds": seconds["reply"],
    }


def ours(options: Speech, directory: Path | None) -> System:
    """Our model, from the checkpoint or with random weights."""
    from scripts.bench.our_speech import Ours

    return our_system(Ours(options, directory).repeat)


def theirs(options: Speech, directory: Path | None) -> System:
    """Transformers' model, from the checkpoint or with random weights."""
    from scripts.bench.their_speech import Theirs

    model = Theirs(options, directory)
    return their_system(model.repeat, model.device)
