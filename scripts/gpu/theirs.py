"""Transformers' model on the same machine: the programs of the table under the names that ours have there.

It is loaded once, with random weights. Decoding is the time of a reply without that of its first token; before it stand
prompts that fill the rows about as far as ours are filled. Transformers does not stream: its first audio is there when
the reply is complete.
"""

import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.gpu.reply import reply_timings
from scripts.gpu.sizes import Sizes, decode_name, frame_name, prefill_name, sound_name
from scripts.gpu.steps import Fact, Step, once
from scripts.gpu.timing import Timing

NEW, REPETITIONS = 16, 2


def their_steps(sizes: Sizes) -> list[Step]:
    """The steps of the section; the model is made by the first. Without transformers there is nothing to measure."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        return [Step("transformers", lambda: [Fact("not installed", ", ".join(missing))])]
    loaded = once(lambda: load(sizes))
    return [
        Step("transformers' model", lambda: loaded().versions(), 60.0),
        *(Step(decode_name(*c), lambda c=c: loaded().decode(*c), 20.0) for c in sizes.their_decode[:1]),
        *(Step(prefill_name(n), lambda n=n: loaded().prefill(n), 20.0) for n in sizes.their_prefill),
        Step("frames and sound", lambda: loaded().speech(), 30.0),
        *(Step(decode_name(*c), lambda c=c: loaded().decode(*c), 30.0) for c in sizes.their_decode[1:]),
        Step("a spoken reply", lambda: reply_timings(sizes, loaded().model.repeat), 60.0),
    ]


def load(sizes: Sizes) -> "Theirs":
    """The whole model, as scripts/bench loads it: of a small shape the checkpoint that ours has."""
    from scripts.bench.their_speech import Theirs as Spoken
    from scripts.small.checkpoint import make_checkpoint

    if sizes.shape == "full":
        return Theirs(sizes, Spoken(sizes.speech(), None))
    with tempfile.TemporaryDirectory() as folder:
        return Theirs(sizes, Spoken(sizes.speech(), make_checkpoint(Path(folder) / sizes.shape, sizes.shape)))


class Theirs:
    """Their model as `scripts/bench` has it, and what is measured of it."""

    def __init__(self, sizes: Sizes, model: Any):
        self.sizes, self.model = sizes, model

    def versions(self) -> list[Fact]:
        """What it runs on."""
        import torch
        import transformers

        versions = f"transformers {transformers.__version__}, torch {torch.__version__}, {self.model.device}"
        return [Fact("transformers' side", versions)]

    def decode(self, rows: int, slots: int) -> list[Timing]:
        """Steps of decoding after prompts that fill `slots` slots with their replies."""
        ids = self.prompts(rows, slots - NEW - 1)
        prompt, _ = self.timed(lambda: self.answer(ids, 1))
        whole, once = self.timed(lambda: self.answer(ids, 1 + NEW))
        seconds = (whole - prompt) / NEW
        return [Timing(decode_name(rows, slots), 1e3 * seconds, once, rows / seconds, "tokens/s")]

    def prefill(self, tokens: int) -> list[Timing]:
        """A prompt of one row, to the first token."""
        ids = self.prompts(1, tokens)
        seconds, once = self.timed(lambda: self.answer(ids, 1))
        return [Timing(prefill_name(tokens), 1e3 * seconds, once, tokens / seconds, "tokens/s")]

    def speech(self) -> list[Timing]:
        """Frames of one row after the first, and a chunk of Code2Wav."""
        import torch

        model, frames = self.model, 4
        with torch.no_grad():
            # The reply leaves the settings with which the Talker is called alone.
            model.reply()
            first, _ = self.timed(lambda: model.codes(1))
            whole, once = self.timed(lambda: model.codes(1 + frames))
            codes = model.codes(frames)
            sound, made = self.timed(lambda: model.model.code2wav.chunked_decode(codes, 300, 25))
        frame = (whole - first) / frames
        return [
            Timing(frame_name(1), 1e3 * frame, once, 1 / frame, "frames/s"),
            Timing(sound_name(1, frames), 1e3 * sound, made),
        ]

    def prompts(self, rows: int, tokens: int) -> Any:
        """Random ordinary tokens [rows, tokens]."""
        import torch

        from scripts.bench.system import prompts

        return torch.tensor(prompts(rows, tokens), device=self.model.device)

    def answer(self, ids: Any, new: int) -> None:
        """Greedy replies of `new` tokens by the ordinary entry point."""
        import torch

        from scripts.bench.system import require

        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        out = self.model.model.thinker.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **settings)
        require("new tokens", out.shape[1] - ids.shape[1], new)

    def timed(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Median seconds after a first call, and the seconds of that."""
        from scripts.bench.system import timed

        first, *rest = (timed(run, self.model.device)[0] for _ in range(1 + REPETITIONS))
        return statistics.median(rest), first
