"""Measure the drafting loop itself: an oracle drafts the known reply, so a round gives as many tokens as it verifies.

Plain decoding is the compiled loop that users run without a drafter, not a loop on the host. With transformers it is
the structure of the official PyTorch loop: one forward of the block, a comparison, the cache cropped, and one read by
the host per round. One repetition decodes plainly and then with rounds of each width; figures are tokens per second of
all rows, without prefill, and the ratio to the same system's plain loop.
"""

from inspect import signature
from pathlib import Path
from typing import Any

from omni_jax.inputs.batch import Batch
from scripts.bench.compare import Row
from scripts.bench.options import Text
from scripts.bench.system import System, our_system, prompts, require, their_system, timed

# Tokens that a round verifies.
WIDTHS = (4, 8, 16)
ROWS: tuple[Row, ...] = (
    ("plain, tokens/s", "plain", 1.0, ".1f"),
    *((f"{w} per round, tokens/s", f"oracle_{w}", 1.0, ".1f") for w in WIDTHS),
    *((f"{w} per round / plain", f"gain_{w}", 1.0, ".2f") for w in WIDTHS),
)


def title(options: Text) -> str:
    """What was measured, in one line."""
    sizes = f"batch {options.batch}, new {options.new}"
    return f"drafting by an oracle, {options.run.shape}, {options.run.dtype}, {sizes}"


def figures(options: Text, seconds: dict[str, float]) -> dict[str, float]:
    """Tokens per second, and their ratios to the plain loop."""
    tokens = options.batch * (options.new - 1)
    rates = {name: tokens / seconds[name] for name in ("plain", *(f"oracle_{w}" for w in WIDTHS))}
    return {**rates, **{f"gain_{w}": rates[f"oracle_{w}"] / rates["plain"] for w in WIDTHS}}


def ours(options: Text, directory: Path | None) -> System:
    """Our engines, plain and speculative."""
    from scripts.bench.thinker import our_thinker
    from scripts.small.oracle import oracle

    model, batch = our_thinker(options.run, directory), Batch.of_text(prompts(options.batch, options.prompt))
    known = model.decode(batch, options.new)

    def repeat() -> dict[str, float]:
        parts = {"plain": model.decode(batch, options.new).decode_seconds}
        for width in WIDTHS:
            decoded = model.decode(batch, options.new, oracle(known.requests, width))
            parts[f"oracle_{width}"] = decoded.decode_seconds
            require("tokens", decoded.rows, known.rows)
        return parts

    return our_system(repeat)


def theirs(options: Text, directory: Path | None) -> System:
    """Transformers' Thinker in the official loop's structure, with width 1 for plain decoding."""
    import torch

    from scripts.bench.their_thinker import their_thinker

    model, device = their_thinker(options.run, directory)
    prompt = torch.tensor(prompts(options.batch, options.prompt), device=device)

    def repeat() -> dict[str, float]:
        seconds, known = _their_rounds(model, prompt, options.new, 1, None, device)
        parts = {"plain": seconds}
        for width in WIDTHS:
            parts[f"oracle_{width}"], drafted = _their_rounds(model, prompt, options.new, width, known, device)
            require("tokens", drafted.tolist(), known.tolist())
        return parts

    return their_system(repeat, device)


def _their_rounds(model: Any, prompt: Any, count: int, width: int, known: Any, device: str) -> tuple[float, Any]:
    """Seconds after the prompt int64 [B, T], and `count` new tokens [B, count]; `known` [B, count] are the drafts."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    # transformers has called its keyword `cache` since 5.24.
    keyword = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def rounds() -> Any:
        new = token
        while new.shape[1] < count:
            at = new.shape[1]
            drafts = known[:, at : at + width - 1] if known is not None else new[:, :0]
            block = torch.cat([new[:, -1:], drafts], dim=1)
            held = prompt.shape[1] + at - 1
            positions = torch.arange(held, held + block.shape[1], device=device).expand(3, block.shape[0], -1)
            best = model(input_ids=block, position_ids=positions, **{keyword: cache}).logits.argmax(-1)
            accepted = (drafts == best[:, :-1]).int().cumprod(1).sum(1).min().item()
            new = torch.cat([new, best[:, : accepted + 1]], dim=1)
            rejected = block.shape[1] - accepted - 1
            if rejected:
                cache.crop(-rejected)
        return new[:, :count]

    with torch.no_grad():
        first = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **{keyword: cache}).logits[:, -1:]
        token = first.argmax(-1)
        return timed(rounds, device)
