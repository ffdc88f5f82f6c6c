"""The stage drafters: a DFlash and an EAGLE-3 drafter for the Thinker, trained on what it says to training prompts.

    rows/*.train.jsonl -> drafters/prompts.jsonl -> drafters/replies.jsonl -> dflash/model, eagle3/model

Both learn from the same replies for as many steps, with as many rows in each, and have about as many parameters;
neither has embeddings of its own. Each is at most 1 MB in bfloat16.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import omni_jax
from omni_jax.files import write_whole
from omni_jax.flags import EndingFlags
from omni_jax.omni import Omni
from omni_jax.train.command import train_recipe
from omni_jax.train.drafters.new import Sizes
from omni_jax.train.drafters.objective import BlockSettings, ChainSettings
from omni_jax.train.drafters.questions import Regenerate, run_regenerate
from omni_jax.train.drafters.recipes import DFlash, Eagle3, Target
from omni_jax.train.loop import Trained
from omni_jax.train.settings import Batching, Compute, Run
from scripts.nano.rows import rows_path

ROWS, LENGTH = 8, 512
# Longer than any answer.
NEW_TOKENS = 64
RATE = 2e-3
BLOCK = BlockSettings(layers=3, features=3, block_size=16, anchors=64)
CHAIN = ChainSettings(draft_vocab_size=640, unrolled=7)
BLOCK_SIZES = Sizes(heads=4, kv_heads=2, head_dim=32, mlp=256)
CHAIN_SIZES = Sizes(heads=4, kv_heads=2, head_dim=32, mlp=704)


def write_replies(directory: Path, senses: Sequence[str], each: int, seed: int) -> Path:
    """What the Thinker says to `each` training prompts of every sense, going on where it was: the file of replies."""
    prompts, replies = directory / "drafters" / "prompts.jsonl", directory / "drafters" / "replies.jsonl"
    if not prompts.exists():
        prompts.parent.mkdir(exist_ok=True)
        write_whole(prompts, "".join(line + "\n" for line in _prompts(directory, senses, each, seed)))
    model = directory / "thinker" / "model"
    asked = Regenerate(model=model, data=(prompts,), output=replies, ending=EndingFlags(max_new_tokens=NEW_TOKENS))
    run_regenerate(asked, _load)
    return replies


def train_drafters(directory: Path, replies: Path, steps: int, seed: int, workers: int) -> dict[str, Trained]:
    """Train both drafters on replies, going on where they were: what the recipes' loop gives, by their names."""
    run = Run(
        model=directory / "thinker" / "model", data=(replies,), output=directory, steps=steps, seed=seed, save_every=200
    )
    batch, compute = Batching(rows=ROWS, max_length=LENGTH, workers=workers, coarse=True), Compute(remat="none")
    trained = {}
    for recipe in (
        DFlash(run=run, batch=batch, compute=compute, drafter=BLOCK, sizes=BLOCK_SIZES),
        Eagle3(run=run, batch=batch, compute=compute, drafter=CHAIN, sizes=CHAIN_SIZES),
    ):
        output = directory / "drafters" / recipe.NAME
        made = train_recipe(
            replace(
                recipe,
                run=replace(run, output=output),
                optimizer=replace(recipe.optimizer, learning_rate=RATE),
                target=Target(states=output.with_name(f"{recipe.NAME}-states")),
            ),
            _load,
        )
        assert made is not None
        trained[recipe.NAME] = made
    return trained


def _prompts(directory: Path, senses: Sequence[str], each: int, seed: int) -> list[str]:
    """Random training rows of every sense, in a random order; their media are found from a folder beside them."""
    draw, chosen = np.random.default_rng(seed), []
    for sense in senses:
        lines = rows_path(directory, sense, "train").read_text().splitlines()
        chosen += [lines[i] for i in draw.permutation(len(lines))[:each]]
    return [json.dumps({"messages": json.loads(chosen[i])["messages"]}) for i in draw.permutation(len(chosen))]


def _load(model: Path, parts: tuple[str, ...], mesh: Any) -> Omni:
    return omni_jax.load(model, parts=parts, mesh=mesh)
