"""Every recipe from the command line to what users load, on the tiny checkpoint."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from tests.helpers.commands import status_of
from tests.parity import user

FRAMES = 5


@pytest.fixture
def rows(tmp_path: Path, omnis: Callable) -> Path:
    """Four conversations whose last replies have codes too."""
    books = omnis("tiny").config.talker.num_code_groups
    codes = [[(3 * q + f) % 20 for f in range(FRAMES)] for q in range(books)]
    texts = ("Good morning!", "A longer reply than that one.", "No.", "It is late, and I am tired.")
    lines = [
        {"messages": [*user(f"Question {i}?"), {"role": "assistant", "content": text}], "codes": codes}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


def trained(recipe: str, rows: Path, model: Path, *flags: str) -> Path:
    """Train for a few steps: the directory of the result, once the loss was seen to fall."""
    output = rows.parent / recipe
    asked = ["--model", str(model), "--data", str(rows), "--output", str(output), "--steps", "8", "--log-every", "1"]
    usual = ["--learning-rate", "3e-3", "--warmup-ratio", "0", "--workers", "0", "--max-length", "128"]
    assert status_of(["train", recipe, *asked, *usual, *flags]) == 0
    with open(output / "metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 8 and min(losses[4:]) < losses[0]
    return output / "model"


@pytest.mark.slow
def test_lora(rows: Path, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture) -> None:
    adapter = trained("lora", rows, checkpoints("tiny"))
    assert "experts: not adapted" in " ".join(capsys.readouterr().err.split())
    plain, adapted = (omni_jax.load(checkpoints("tiny"), adapter=one, parts=("thinker",)) for one in (None, adapter))
    batch = plain.prepare(user("Question 1?"))
    assert not np.allclose(plain.logits(batch), adapted.logits(batch), atol=1e-3)


@pytest.mark.slow
def test_talker(rows: Path, checkpoints: Callable[[str], Path]) -> None:
    omni = omni_jax.load(trained("talker", rows, checkpoints("tiny")))
    reply = omni.generate(user("Question 1?"), max_new_tokens=4, speech=True, max_frames=4)
    assert reply.codes is not None and reply.codes.shape[1] <= 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dflash", "eagle3"])
def test_drafters(recipe: str, rows: Path, checkpoints: Callable[[str], Path]) -> None:
    omni = omni_jax.load(checkpoints("tiny"), parts=("thinker",))
    more = ["--least-accuracy", "0", "--mesh", "data=2", "--rows", "2", "--dtype", "bfloat16"]
    drafter = omni_jax.load_drafter(trained(recipe, rows, checkpoints("tiny"), *more))
    plain = omni.generate(user("Question 1?"), max_new_tokens=12)
    drafted = omni.generate(user("Question 1?"), max_new_tokens=12, drafter=drafter, draft_tokens=3)
    assert drafted.token_ids == plain.token_ids and drafted.stats["rounds"] > 0


def test_regenerate(rows: Path, checkpoints: Callable[[str], Path]) -> None:
    output = rows.parent / "replies.jsonl"
    asked = ["--model", str(checkpoints("tiny")), "--data", str(rows), "--output", str(output), "--max-new-tokens", "3"]
    assert status_of(["train", "regenerate", *asked]) == 0
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(made) == 4 and all(line["messages"][-1]["role"] == "assistant" for line in made)


def test_regenerate_in_other_weights(
    rows: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded as asked, and what other ones have answered is not gone on with."""
    loaded: list[dict[str, Any]] = []
    load = omni_jax.load
    monkeypatch.setattr(omni_jax, "load", lambda model, **how: (loaded.append(how), load(model, **how))[1])
    output = rows.parent / "other.jsonl"
    asked = ["--model", str(checkpoints("tiny")), "--data", str(rows), "--output", str(output), "--max-new-tokens", "2"]
    held = ["--dtype", "bfloat16", "--quantize", "int8"]
    assert status_of(["train", "regenerate", *asked, *held]) == 0
    assert loaded == [{"parts": ("thinker",), "mesh": None, "dtype": "bfloat16", "quantize": "int8"}]
    assert status_of(["train", "regenerate", *asked]) == 3
