"""The drafters of nano: what they are trained on, that both are small, and that training them writes both."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.config import OmniConfig
from omni_jax.omni import Omni
from omni_jax.rows.media import located
from omni_jax.train.drafters.new import new_dflash, new_eagle3
from omni_jax.weights.drafters import load_drafter
from omni_jax.weights.locate import DRAFTERS
from omni_jax.weights.trees import flatten
from scripts.nano import drafters
from scripts.nano.config import nano_config, nano_tokenizer
from scripts.nano.mixture import drawn_rows
from scripts.nano.senses import wordings
from tests.nano.small import write_rows, write_small


@cache
def nano() -> Omni:
    return omni_jax.load("nano")


def test_both_have_as_many_parameters_and_are_small() -> None:
    config = OmniConfig.from_hf(nano_config(nano_tokenizer(wordings())))
    block, V = drafters.BLOCK, drafters.CHAIN.draft_vocab_size
    one = new_dflash(config, 5, block.layers, block.features, block.block_size, drafters.BLOCK_SIZES, 0)
    head = np.zeros((config.thinker.text.vocab_size, config.thinker.text.hidden_size), np.float32)
    other = new_eagle3(config, np.zeros(V, int), head, drafters.CHAIN_SIZES, 0)
    sizes = [sum(np.size(x) for name, x in flatten(d.params).items() if name != "d2t") for d in (one, other)]
    assert all(450_000 < size <= 500_000 for size in sizes), sizes


def test_prompts_are_of_every_sense(tmp_path: Path) -> None:
    write_rows(tmp_path)
    wanted = drafters.asked_of(tmp_path, ["written", "repeat", "remember"], 2)
    answers = sorted(messages[-1]["content"] for messages in drawn_rows(tmp_path, wanted, 0))
    assert answers == ["River.", "Sea.", "The digit is two.", "The digit is two.", "Your word is sea."]


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("sense", ["scene", "digits", "red"])
def test_those_that_ship_lose_nothing(kind: str, sense: str, data_dir: Path) -> None:
    """Of a picture, a sound and a video with its sound: the same text, spoken by the same codes, in fewer rounds."""
    folder = data_dir / "nano"
    row = json.loads((folder / f"{sense}.jsonl").read_text().splitlines()[0])
    asked, spoken = located(row["messages"][:-1], folder), {"speech": True, "max_frames": 12}
    omni, drafter = nano(), omni_jax.load_drafter(f"nano/{kind}")
    plain, drafted = (omni.generate(asked, max_new_tokens=32, drafter=one, **spoken) for one in (None, drafter))
    assert drafted.token_ids == plain.token_ids and plain.stats["finish_reason"] == "stop"
    assert drafted.stats["rounds"] < len(plain.token_ids)
    np.testing.assert_array_equal(drafted.codes, plain.codes)


@pytest.mark.slow
def test_both_are_trained_on_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    write_small(tmp_path, monkeypatch)
    monkeypatch.setattr(drafters, "NEW_TOKENS", 20)
    monkeypatch.setattr(drafters, "BLOCK", replace(drafters.BLOCK, layers=1, anchors=4))
    monkeypatch.setattr(drafters, "CHAIN", replace(drafters.CHAIN, unrolled=2))
    replies = drafters.write_replies(tmp_path, ["repeat", "written"], 2, 0)
    rows = [json.loads(line) for line in replies.read_text().splitlines()]
    assert len(rows) == 4 and all(row["token_ids"] for row in rows)
    made = drafters.train_drafters(tmp_path, replies, 2, 0, 0)
    assert {name: one.steps for name, one in made.items()} == {"dflash": 2, "eagle3": 2}
    assert [load_drafter(one.model).kind for one in made.values()] == ["dflash", "eagle3"]
