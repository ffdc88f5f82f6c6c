"""transformers, with the shipped directory, gives nano's answers to rows of its test: the same tokens, and right ones.

Videos are compared in `tests/test_omni.py`, because these rows state options that `reference_inputs` does not read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.omni import Omni
from omni_jax.rows.media import located
from scripts.nano.judging import is_right
from tests.parity import reference_inputs, user

TEXT = {"add": ("What is 6 plus 4?", "Six plus four is ten."), "spell": ("Spell the word river.", "R, i, v, e, r.")}


@pytest.mark.parametrize("sense", ["digits", "written", "scene", *TEXT])
def test_answers_are_those_of_transformers(
    sense: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any], data_dir: Path
) -> None:
    import torch

    omni, folder = omnis("nano"), data_dir / "nano"
    if sense in TEXT:
        question, answer = TEXT[sense]
        rows = [{"sense": sense, "messages": [*user(question), {"role": "assistant", "content": answer}]}]
    else:
        rows = list(map(json.loads, (folder / f"{sense}.jsonl").read_text().splitlines()[:3]))
    right = []
    for row in rows:
        asked = located(row["messages"][:-1], folder)
        batch = omni.prepare(asked)
        with torch.no_grad():
            out = reference("nano").thinker.generate(
                **reference_inputs(omni.processor, [asked], batch), max_new_tokens=40, do_sample=False,
                eos_token_id=omni.config.im_end_token_id, pad_token_id=0,
            )  # fmt: skip
        reply = omni.generate(asked, max_new_tokens=40)
        assert reply.token_ids == out[0, batch.token_ids.shape[1] :].tolist()
        right.append(is_right(row, reply.text))
    assert np.mean(right) > 0.6
