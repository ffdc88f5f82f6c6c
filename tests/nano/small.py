"""A nano of the smallest sizes, and rows to train it on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import CODEC_MARKS
from omni_jax.train.saving import save_part
from scripts.nano import begin
from scripts.nano.config import nano_config, nano_tokenizer
from scripts.nano.rows import assistant, user
from scripts.nano.senses import wordings
from scripts.nano.words import NUMBERS

CODES = 8


def small_config(tokenizer: Any) -> dict[str, Any]:
    """The config of nano with fewer and smaller layers, and eight codes in a codebook."""
    config = nano_config(tokenizer)
    config["code2wav_config"] |= {"decoder_dim": 32, "hidden_size": 16, "num_hidden_layers": 1, "codebook_size": CODES}
    config["talker_config"]["text_config"] |= {"vocab_size": CODES + CODEC_MARKS, "num_hidden_layers": 1}
    config["talker_config"]["code_predictor_config"] |= {
        "vocab_size": CODES, "num_hidden_layers": 1, "layer_types": ["full_attention"],
    }  # fmt: skip
    talker = config["talker_config"]
    marks = ["codec_pad_id", "codec_bos_id", "codec_eos_token_id", "codec_nothink_id", "codec_think_bos_id"]
    for i, name in enumerate([*marks, "codec_think_eos_id"]):
        talker[name] = CODES + i
    talker["speaker_id"] = {"chelsie": CODES + 10, "ethan": CODES + 11}
    return config


def write_small(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the untrained model where the stage thinker would: its directory. It answers in numbers alone.

    So its answers are the same tokens when their text is read again.
    """
    from safetensors.numpy import load_file

    monkeypatch.setattr(begin, "nano_config", small_config)
    begun, model = begin.write_beginning(directory / "begin", wordings(), 0), directory / "thinker" / "model"
    tensors, tokenizer = load_file(begun / begin.FILE), nano_tokenizer(wordings())
    others = np.ones(len(tensors["thinker.lm_head.weight"]), bool)
    others[[tokenizer.encode(f" {number}").ids[0] for number in NUMBERS]] = False
    tensors["thinker.lm_head.weight"][others] = 0
    begin.write_tensors(begun, tensors)
    model.parent.mkdir(parents=True)
    save_part("thinker", begun, None, {}, model)
    return model


def write_rows(directory: Path) -> None:
    """Rows of three senses, one with pictures."""
    from PIL import Image

    (directory / "rows").mkdir(parents=True)
    (directory / "media").mkdir()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(directory / "media" / "a.png")
    picture = {"type": "image", "image": "../media/a.png"}
    senses = {
        "written": [[user(picture, "Which digit is it?"), assistant("The digit is two.")]] * 3,
        "repeat": [[user(f"Say this: {word}."), assistant(f"{word.capitalize()}.")] for word in ("sea", "river")],
        "remember": [
            [user("My word is sea."), assistant("I will remember it."), user("Which?"), assistant("Your word is sea.")]
        ],
    }
    for name, rows in senses.items():
        lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (directory / "rows" / f"{name}.train.jsonl").write_text(lines)
