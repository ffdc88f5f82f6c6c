"""Measure the drafting loop itself: an oracle drafts what the target will say, so a round gives all that it verifies.

Plain decoding is the compiled loop that users run without a drafter, not a loop on the host. Theirs is the structure of
the official PyTorch loop: one forward of the block, a comparison, the cache cropped, and a read by the host each round.
One repetition decodes plainly and then with rounds of each width; figures are tokens a second of all rows, prefill left
out, and the ratio to one's own plain loop.
"""

from pathlib import Path
from typing import Any

from scripts.bench.text import answer_together, our_thinker, prompts, text_batch, their_thinker
from scripts.bench.worker import Bench, System, our_system, require, their_system, timed

LENGTHS = (4, 8, 16)
ROWS = (
    ("plain, tokens/s", "plain", 1.0, ".1f"),
    *((f"{w} a round, tokens/s", f"oracle_{w}", 1.0, ".1f") for w in LENGTHS),
    *((f"{w} a round / plain", f"gain_{w}", 1.0, ".2f") for w in LENGTHS),
)


def title(bench: Bench) -> str:
    """What was measured, in a line."""
    return f"drafting by an oracle, {bench.shape}, {bench.dtype}, batch {bench.batch}, new {bench.new}"


def figures(bench: Bench, seconds: dict[str, float]) -> dict[str, float]:
    """Tokens a second, and their ratios to the plain loop."""
    drawn = bench.batch * (bench.new - 1)
    rates = {name: drawn / seconds[name] for name in ("plain", *(f"oracle_{w}" for w in LENGTHS))}
    return {**rates, **{f"gain_{w}": rates[f"oracle_{w}"] / rates["plain"] for w in LENGTHS}}


def ours(bench: Bench, directory: Path | None) -> System:
    """Our engines, plain and speculative."""
    from omni_jax.decode.draft.engine import SpeculativeEngine
    from omni_jax.decode.engine import Engine, PlainEngine
    from omni_jax.decode.sampling import Sampling
    from scripts.small.oracle import oracle

    batch = text_batch(prompts(bench).astype("int32"))
    plain = PlainEngine(*our_thinker(bench, directory), Sampling())

    def run(engine: Engine) -> tuple[Any, float]:
        requests, batching = answer_together(engine, batch, bench.new)
        require("new tokens", sum(len(request.token_ids) for request in requests), bench.batch * bench.new)
        return requests, batching.decode_seconds

    said, _ = run(plain)

    def repeat() -> dict[str, float]:
        parts = {"plain": run(plain)[1]}
        for length in LENGTHS:
            requests, parts[f"oracle_{length}"] = run(SpeculativeEngine(plain, oracle(said, length)))
            require("tokens", [r.token_ids for r in requests], [r.token_ids for r in said])
        return parts

    return our_system(repeat)


def theirs(bench: Bench, directory: Path | None) -> System:
    """Their Thinker in the official loop's structure, with width 1 for plain decoding."""
    import torch
    from transformers import DynamicCache

    model, device = their_thinker(bench, directory)
    prompt = torch.tensor(prompts(bench), device=device)

    @torch.no_grad()
    def decode(width: int, known: Any) -> tuple[float, Any]:
        """Seconds behind the prompt, and all new tokens; `known` are the oracle's."""
        cache = DynamicCache()
        first = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache).logits[:, -1:]
        token = first.argmax(-1)

        def rounds() -> Any:
            new = token
            while new.shape[1] < bench.new:
                at = new.shape[1]
                drafts = known[:, at : at + width - 1] if known is not None else new[:, :0]
                block = torch.cat([new[:, -1:], drafts], dim=1)
                held = prompt.shape[1] + at - 1
                positions = torch.arange(held, held + block.shape[1], device=device).expand(3, block.shape[0], -1)
                best = model(input_ids=block, position_ids=positions, past_key_values=cache).logits.argmax(-1)
                stands = (drafts == best[:, :-1]).int().cumprod(1).sum(1).min().item()
                new = torch.cat([new, best[:, : stands + 1]], dim=1)
                rejected = block.shape[1] - stands - 1
                if rejected:
                    cache.crop(-rejected)
            return new[:, : bench.new]

        return timed(rounds, device)

    def repeat() -> dict[str, float]:
        seconds, said = decode(1, None)
        parts = {"plain": seconds}
        for width in LENGTHS:
            parts[f"oracle_{width}"], drafted = decode(width, said)
            require("tokens", drafted.tolist(), said.tolist())
        return parts

    return their_system(repeat, device)
