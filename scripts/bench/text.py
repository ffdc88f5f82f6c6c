"""Measure the Thinker's text: prefill, first token, decoding.

Both systems answer the same prompts greedily, through their ordinary entry points. One repetition answers with a single
token, then with the whole reply. Prefill is the time from a prepared batch to the first token on the host (time to
first token, without media); decoding is tokens per second, of all rows, beyond the first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_jax.inputs.batch import Batch
from scripts.bench.compare import Row
from scripts.bench.options import Text
from scripts.bench.system import System, our_system, prompts, require, their_system, timed

ROWS: tuple[Row, ...] = (
    ("prefill, tokens/s", "prefill_tokens_per_second", 1.0, ".1f"),
    ("time to first token, ms", "time_to_first_token", 1e3, ".1f"),
    ("decode, tokens/s", "decode_tokens_per_second", 1.0, ".1f"),
)


def title(options: Text) -> str:
    """What was measured, in one line."""
    sizes = f"batch {options.batch}, prompt {options.prompt}, new {options.new}"
    held = f"{options.run.dtype}{', our experts in int8' if options.run.quantize else ''}"
    return f"{options.run.shape}, {held}, {sizes}"


def figures(options: Text, seconds: dict[str, float]) -> dict[str, float]:
    """Figures from the median seconds of the parts."""
    return {
        "prefill_tokens_per_second": options.batch * options.prompt / seconds["first"],
        "time_to_first_token": seconds["first"],
        "decode_tokens_per_second": options.batch * (options.new - 1) / seconds["others"],
    }


def ours(options: Text, directory: Path | None) -> System:
    """Our Thinker, from the checkpoint or with random weights."""
    from scripts.bench.thinker import our_thinker

    model, batch = our_thinker(options.run, directory), Batch.of_text(prompts(options.batch, options.prompt))
    return our_system(lambda: _repetition(lambda new: model.decode_all(batch, new), options.new))


def theirs(options: Text, directory: Path | None) -> System:
    """Transformers' Thinker, from the checkpoint or with random weights."""
    import torch

    from scripts.bench.their_thinker import their_thinker

    model, device = their_thinker(options.run, directory)
    ids = torch.tensor(prompts(options.batch, options.prompt), device=device)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def answer(new: int) -> None:
        out = model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **settings)
        require("new tokens", out.shape[1] - options.prompt, new)

    return their_system(lambda: _repetition(answer, options.new, device), device)


def _repetition(answer: Callable[[int], Any], new: int, device: str = "cpu") -> dict[str, float]:
    first, _ = timed(lambda: answer(1), device)
    whole, _ = timed(lambda: answer(new), device)
    return {"first": first, "others": whole - first}
