"""Measure training: a step of full fine-tuning of the Thinker's text model, with AdamW in float32.

Both systems take the same random tokens, all of which are learned, with the router's auxiliary loss; encoders are
frozen. One repetition is a step that keeps what the backward pass needs, and one that computes it anew layer by layer
(rematerialisation, which transformers calls gradient checkpointing).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.compare import Row
from scripts.bench.options import Train
from scripts.bench.system import System, our_system, prompts, their_system, timed

ROWS: tuple[Row, ...] = (
    ("train, tokens/s", "tokens_per_second", 1.0, ".1f"),
    ("  with remat, tokens/s", "remat_tokens_per_second", 1.0, ".1f"),
    ("temporaries, MB", "temporary_bytes", 1e-6, ".1f"),
    ("  with remat, MB", "remat_temporary_bytes", 1e-6, ".1f"),
)
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.01
ENCODERS = ("vision", "audio")


def title(options: Train) -> str:
    """What was measured, in one line."""
    return f"{options.run.shape}, {options.run.dtype}, batch {options.batch}, tokens {options.tokens}"


def figures(options: Train, parts: dict[str, float]) -> dict[str, float]:
    """Figures from the medians of the parts: seconds of steps, and what else a system says."""
    tokens = options.batch * options.tokens
    bytes_known = {name: value for name, value in parts.items() if name.endswith("temporary_bytes")}
    return {
        "tokens_per_second": tokens / parts["kept"],
        "remat_tokens_per_second": tokens / parts["remat"],
        **bytes_known,
    }


def ours(options: Train, directory: Path | None) -> System:
    """Our step, from the checkpoint or with random weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from omni_jax.train.batch import TextBatch
    from omni_jax.train.losses.thinker import thinker_loss
    from scripts.bench.thinker import our_thinker

    model = our_thinker(options.run, directory)
    params = {name: value for name, value in model.params.items() if name not in ENCODERS}
    frozen = {name: model.params[name] for name in ENCODERS}
    ids = prompts(options.batch, options.tokens).astype(np.int32)
    positions = np.broadcast_to(np.arange(options.tokens, dtype=np.float32), (3, *ids.shape))
    batch = TextBatch(ids, ids, positions, np.zeros_like(ids))
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(params: Any, state: Any, frozen: Any, batch: Any, remat: bool) -> tuple[Any, Any, jax.Array]:
        def mean(params: Any) -> jax.Array:
            dtype = jnp.dtype(options.run.dtype)
            loss = thinker_loss(params, frozen, batch, declaration=model.declaration, dtype=dtype, remat=remat)
            return loss.total / loss.weight

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    trained = [params, jax.jit(optimizer.init)(params)]
    compiled: dict[str, Any] = {}

    def run(name: str) -> None:
        if name not in compiled:
            lowered = jax.jit(partial(step, remat=name == "remat"), donate_argnums=(0, 1))
            compiled[name] = lowered.lower(*trained, frozen, batch).compile()
        *trained[:], loss = compiled[name](*trained, frozen, batch)
        jax.block_until_ready(loss)

    def repeat() -> dict[str, float]:
        seconds = {name: timed(partial(run, name))[0] for name in ("kept", "remat")}
        return {
            **seconds,
            "temporary_bytes": compiled["kept"].memory_analysis().temp_size_in_bytes,
            "remat_temporary_bytes": compiled["remat"].memory_analysis().temp_size_in_bytes,
        }

    return our_system(repeat)


def theirs(options: Train, directory: Path | None) -> System:
    """Transformers' step, from the checkpoint or with random weights."""
    import torch

    from scripts.bench.their_thinker import their_thinker

    model, device = their_thinker(options.run, directory)
    model.float().train()
    for encoder in (model.model.visual, model.model.audio_tower):
        encoder.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    ids = torch.tensor(prompts(options.batch, options.tokens), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.run.dtype == "bfloat16"):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, output_router_logits=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def switched(switch: Callable[[], None]) -> float:
        switch()
        return timed(step, device)[0]

    return their_system(
        lambda: {
            "kept": switched(model.gradient_checkpointing_disable),
            "remat": switched(model.gradient_checkpointing_enable),
        },
        device,
    )
