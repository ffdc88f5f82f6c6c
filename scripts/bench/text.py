"""Measure the Thinker's text: prefill, first token, decode.

Both systems answer the same prompts greedily, through their ordinary entry points. One repetition answers with a single
token, then with the whole reply. Prefill is the time from a prepared batch to the first token on the host (time to
first token, without media); decode is tokens per second of all rows beyond the first.
"""

from pathlib import Path
from typing import Any

from scripts.bench.worker import Bench, System, our_system, require, their_device, their_system, timed

# A line of the table: its label, the figure, what to multiply it by, how to write it.
ROWS = (
    ("prefill, tokens/s", "prefill_tokens_per_second", 1.0, ".1f"),
    ("time to first token, ms", "time_to_first_token", 1e3, ".1f"),
    ("decode, tokens/s", "decode_tokens_per_second", 1.0, ".1f"),
)


def title(bench: Bench) -> str:
    """What was measured, in a line."""
    return f"{bench.shape}, {bench.dtype}, batch {bench.batch}, prompt {bench.prompt}, new {bench.new}"


def figures(bench: Bench, seconds: dict[str, float]) -> dict[str, float]:
    """Figures from the median seconds of the parts."""
    return {
        "prefill_tokens_per_second": bench.batch * bench.prompt / seconds["first"],
        "time_to_first_token": seconds["first"],
        "decode_tokens_per_second": bench.batch * (bench.new - 1) / seconds["others"],
    }


def our_thinker(bench: Bench, directory: Path | None) -> tuple[dict, Any, Any]:
    """Our Thinker from the checkpoint or with random weights: parameters, declaration, and its text model's sizes."""
    import jax.numpy as jnp

    from omni_jax.config import OmniConfig
    from omni_jax.models.param import declare, init_params
    from omni_jax.models.thinker import Thinker
    from scripts.small.configs import config_dict

    if directory is None:
        config = OmniConfig.from_hf(config_dict(bench.shape))
        params = init_params(Thinker, config.thinker, dtype=jnp.dtype(bench.dtype))
    else:
        from convert import load_hf

        tree, config = load_hf(directory, parts=("thinker",), dtype=bench.dtype)
        params = tree["thinker"]
    return params, declare(Thinker, config.thinker), config.thinker.text


def ours(bench: Bench, directory: Path | None) -> System:
    """Our Thinker, from the checkpoint or with random weights."""
    import numpy as np

    from omni_jax.decode.engine import PlainEngine
    from omni_jax.decode.sampling import Sampling

    model, batch = our_thinker(bench, directory), text_batch(prompts(bench).astype(np.int32))

    def answer(new: int) -> None:
        requests, _ = answer_together(PlainEngine(*model, Sampling()), batch, new)
        require("new tokens", sum(len(request.token_ids) for request in requests), bench.batch * new)

    return our_system(lambda: _repetition(answer, bench))


def answer_together(engine: Any, batch: Any, new: int) -> tuple[list[Any], Any]:
    """The requests of a prepared batch, `new` tokens each, run to their end, and what has run them, with its times."""
    from omni_jax.decode.batching import Admission, Batching
    from omni_jax.decode.limits import Limits
    from omni_jax.decode.request import requests_for

    requests = requests_for(batch, Limits(new), [0] * len(batch.mask))
    batching = Batching(engine, len(requests), Admission(batch, requests))
    batching.finish()
    return requests, batching


def their_thinker(bench: Bench, directory: Path | None) -> tuple[Any, str]:
    """Their Thinker from the checkpoint or with random weights, and the device it is on."""
    import torch
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    from scripts.small.configs import config_dict

    dtype, device = getattr(torch, bench.dtype), their_device(bench)
    if directory is None:
        thinker_config: Any = Qwen3OmniMoeConfig(**config_dict(bench.shape)).thinker_config
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return Qwen3OmniMoeThinkerForConditionalGeneration(thinker_config).eval(), device
    from transformers import Qwen3OmniMoeForConditionalGeneration

    whole: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    return whole.thinker.to(device).eval(), device


def theirs(bench: Bench, directory: Path | None) -> System:
    """Their Thinker, from the checkpoint or with random weights."""
    import torch

    model, device = their_thinker(bench, directory)
    ids = torch.tensor(prompts(bench), device=device)
    options = {"do_sample": False, "pad_token_id": 0}

    def answer(new: int) -> None:
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
        )
        require("new tokens", out.shape[1] - bench.prompt, new)

    return their_system(lambda: _repetition(answer, bench, device), device)


def _repetition(answer: Any, bench: Bench, device: str = "cpu") -> dict[str, float]:
    first, _ = timed(lambda: answer(1), device)
    whole, _ = timed(lambda: answer(bench.new), device)
    return {"first": first, "others": whole - first}


def text_batch(token_ids: Any) -> Any:
    """A prepared batch of prompts int32 [B, T] without media or padding."""
    import numpy as np

    from omni_jax.inputs.batch import Batch

    B, T = token_ids.shape
    nothing = np.full((B, T), -1, np.int32)
    return Batch(
        token_ids=token_ids,
        mask=np.ones((B, T), bool),
        position_ids=np.broadcast_to(np.arange(T, dtype=np.float32), (3, B, T)),
        rope_delta=np.zeros(B, np.float32),
        vision=(),
        visual_index=nothing,
        audio=None,
        audio_index=nothing,
    )


def prompts(bench: Bench) -> Any:
    """Random ordinary tokens, int64 [B, T]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 200, (bench.batch, bench.prompt))
