"""The stage drafters: a DFlash and an EAGLE-3 drafter for the Thinker, trained on what it says to training prompts.

    rows/*.train.jsonl -> drafters/prompts.jsonl -> drafters/replies.jsonl -> drafters/<kind>/model

Both learn from the same replies for as many steps, with as many rows in each, and have about as many parameters;
neither has embeddings of its own. Each is at most 1 MB in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omni_jax.files import write_whole
from omni_jax.flags import EndingFlags
from omni_jax.train.drafters.new import Sizes
from omni_jax.train.drafters.objective import BlockSettings, ChainSettings
from omni_jax.train.drafters.questions import Regenerate, run_regenerate
from omni_jax.train.drafters.recipes import DFlash, Eagle3, Target
from omni_jax.train.loop import Trained
from omni_jax.train.settings import Batching, Compute, Run
from scripts.nano.mixture import as_rows, drawn_rows
from scripts.nano.origin import check_origin, model_of
from scripts.nano.rows import rows_digest, rows_there
from scripts.nano.thinker import trained_by

ROWS, LENGTH = 4, 512
# Longer than any answer.
NEW_TOKENS = 64
RATE = 2e-3
BLOCK = BlockSettings(layers=3, features=3, block_size=16, anchors=32)
CHAIN = ChainSettings(draft_vocab_size=640, unrolled=4)
BLOCK_SIZES = Sizes(heads=4, kv_heads=2, head_dim=32, mlp=256)
CHAIN_SIZES = Sizes(heads=4, kv_heads=2, head_dim=32, mlp=704)


def write_replies(directory: Path, senses: Sequence[str], each: int, seed: int) -> Path:
    """What the Thinker says to `each` training prompts of every sense, going on where it was: the file of replies.

    InputError if the folder drafters holds what other prompts or another Thinker gave.
    """
    folder, model = directory / "drafters", directory / "thinker" / "model"
    asked = {"rows": rows_digest(directory, senses), "prompts": each, "seed": seed}
    check_origin(directory, "drafters", [folder], {"thinker/model": model_of(model, "thinker"), **asked})
    prompts, replies = folder / "prompts.jsonl", folder / "replies.jsonl"
    if not prompts.exists():
        folder.mkdir(exist_ok=True)
        write_whole(prompts, as_rows(drawn_rows(directory, asked_of(directory, senses, each), seed)))
    ending = EndingFlags(max_new_tokens=NEW_TOKENS)
    run_regenerate(Regenerate(model=model, data=(prompts,), output=replies, ending=ending))
    return replies


def train_drafters(directory: Path, replies: Path, steps: int, seed: int, workers: int) -> dict[str, Trained]:
    """Train both drafters on replies, going on where they were: what the recipes' loop gives, by their names."""
    model, folder, common = directory / "thinker" / "model", directory / "drafters", Compute(remat="none")
    batch = Batching(rows=ROWS, max_length=LENGTH, workers=workers, coarse=True)

    def run(kind: str) -> Run:
        return Run(model=model, data=(replies,), output=folder / kind, steps=steps, seed=seed, save_every=200)

    def target(kind: str) -> Target:
        return Target(states=folder / f"{kind}-states")

    block, chain = DFlash.NAME, Eagle3.NAME
    trained = {}
    for recipe in (
        DFlash(run=run(block), batch=batch, compute=common, drafter=BLOCK, sizes=BLOCK_SIZES, target=target(block)),
        Eagle3(run=run(chain), batch=batch, compute=common, drafter=CHAIN, sizes=CHAIN_SIZES, target=target(chain)),
    ):
        optimizer = replace(recipe.optimizer, learning_rate=RATE)
        trained[recipe.NAME] = trained_by(replace(recipe, optimizer=optimizer))
    return trained


def asked_of(directory: Path, senses: Sequence[str], each: int) -> dict[str, int]:
    """How many training prompts of each sense the Thinker answers: `each`, or all that there are."""
    return {sense: min(each, rows_there(directory, sense, "train")) for sense in senses}
