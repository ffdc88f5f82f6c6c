"""What is measured, by shape: "full" is the table of the public model on one H200, "tiny" the same steps for a CPU.

The names of measurements are made here, so that the same program has the same name with the kernel, in transformers and
in the table.
"""

from dataclasses import dataclass
from typing import Any, Literal

from scripts.bench.options import Dtype, Run, Shape, Speech

# Frames per second of sound, and those of one chunk of Code2Wav in a stream.
FRAMES_PER_SECOND, STREAMED_FRAMES = 12.5, 4
FIRST_AUDIO, SECOND_OF_SPEECH, WHOLE_REPLY = "first audio", "a second of speech", "a whole spoken reply"
START = "cold start to first token, warm cache"
GOALS = {
    "decode 1 rows, 2048 slots": "300 tokens/s", "decode 32 rows, 4096 slots": "1,500 tokens/s",
    "prefill 1 x 8192": "250 ms", SECOND_OF_SPEECH: "100 ms", FIRST_AUDIO: "150 ms", START: "20,000 ms",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The sizes of one shape, the most important ones first.

    decode: rows and cache slots. prefill: tokens of one row. piece: tokens of a prompt's piece, and those before it.
    verify: tokens of a round of one row. frames: rows of the Talker. speech_prompt: columns. sound: rows and frames.
    reply: prompt, new tokens and frames of a spoken reply. their_decode, their_prefill: of transformers, which takes
    longer. profiled: rows and slots.
    """

    shape: Literal["full", "tiny"]
    dtype: Dtype
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    piece: tuple[int, int]
    verify: tuple[int, ...]
    frames: tuple[int, ...]
    frame_slots: int
    speech_prompt: int
    sound: tuple[tuple[int, int], ...]
    reply: tuple[int, int, int]
    their_decode: tuple[tuple[int, int], ...]
    their_prefill: tuple[int, ...]
    profiled: tuple[int, int]

    def speech(self) -> Speech:
        """The spoken reply as scripts/bench is asked for it."""
        prompt, new, frames = self.reply
        shape: Shape = self.shape
        return Speech(prompt=prompt, new=new, frames=frames, run=Run(shape, self.dtype, 2))


FULL = Sizes(
    "full", "bfloat16",
    decode=((1, 2048), (32, 4096), (8, 2048), (64, 4096)), prefill=(8192, 512), piece=(512, 32768), verify=(8, 4, 16),
    frames=(1, 8), frame_slots=1024, speech_prompt=512, sound=((1, 4), (8, 4), (1, 16)), reply=(512, 16, 24),
    their_decode=((1, 2048), (32, 4096), (8, 2048)), their_prefill=(8192,), profiled=(1, 2048),
)  # fmt: skip
TINY = Sizes(
    "tiny", "float32",
    decode=((1, 256), (2, 256)), prefill=(16,), piece=(32, 200), verify=(4,),
    frames=(1,), frame_slots=256, speech_prompt=16, sound=((1, 4),), reply=(16, 8, 4),
    their_decode=((1, 256),), their_prefill=(16,), profiled=(1, 256),
)  # fmt: skip


def sizes_of(shape: str) -> Sizes:
    """The sizes of "full" or "tiny"."""
    return {"full": FULL, "tiny": TINY}[shape]


def decode_name(rows: int, slots: int) -> str:
    """One step of plain decoding."""
    return f"decode {rows} rows, {slots} slots"


def prefill_name(tokens: int) -> str:
    """The prompt of one row."""
    return f"prefill 1 x {tokens}"


def piece_name(tokens: int, held: int) -> str:
    """A piece of a long prompt, after what the cache holds of it."""
    return f"piece 1 x {tokens} after {held}"


def frame_name(rows: int) -> str:
    """One frame of the Talker with all its codes."""
    return f"speech frame, {rows} rows"


def speech_prompt_name(columns: int) -> str:
    """The Talker's prompt of one row."""
    return f"speech prompt 1 x {columns}"


def sound_name(rows: int, frames: int) -> str:
    """One chunk of Code2Wav."""
    return f"sound of {rows} x {frames} frames"


def parts_of_first_audio(sizes: Sizes) -> Any:
    """What runs until the first samples: the prompt, a step, the Talker's prompt, a frame, a chunk of sound."""
    rows, slots = sizes.decode[0]
    names = (
        prefill_name(sizes.prefill[-1]), decode_name(rows, slots), speech_prompt_name(sizes.speech_prompt),
        frame_name(1), sound_name(1, STREAMED_FRAMES),
    )  # fmt: skip
    return tuple((name, 1.0) for name in names)


def parts_of_a_second() -> Any:
    """What a second of speech takes: its frames, and their chunks of sound."""
    return (frame_name(1), FRAMES_PER_SECOND), (sound_name(1, STREAMED_FRAMES), FRAMES_PER_SECOND / STREAMED_FRAMES)
