"""Results of stages are not gone on with when what they were made from has changed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.errors import InputError
from scripts.nano.begin import check_beginning, drawn, write_beginning
from scripts.nano.origin import check_origin
from scripts.nano.rows import rows_digest
from scripts.nano.senses import wordings
from scripts.stored_state import restored, save


def test_a_state_of_other_arrays_is_refused(tmp_path: Path) -> None:
    file, state = tmp_path / "state.npz", {"a": jnp.ones((2, 3)), "b": jnp.zeros(2, jnp.int32)}
    save(file, state, 7, 1.5)
    again, step, spent = restored(file, {"a": jnp.zeros((2, 3)), "b": jnp.ones(2, jnp.int32)})
    assert (step, spent) == (7, 1.5) and again["b"].dtype == jnp.int32
    np.testing.assert_array_equal(again["a"], state["a"])
    with pytest.raises(InputError, match=r"float32 of shape \(2, 3\) where float32 of shape \(3, 2\) is wanted"):
        restored(file, {"a": jnp.zeros((3, 2)), "b": state["b"]})
    with pytest.raises(InputError, match="holds 2 arrays, not 1; delete it"):
        restored(file, {"a": state["a"]})
    with pytest.raises(InputError, match="int32 of shape"):
        restored(file, {"a": state["a"], "b": jnp.zeros(2)})


def test_an_untrained_model_of_other_settings_is_refused(tmp_path: Path) -> None:
    begun = write_beginning(tmp_path / "begin", wordings(), 3)
    assert write_beginning(begun, wordings(), 3) == begun
    with pytest.raises(InputError, match="began with another seed; go back to that, or delete drawn, begin and words"):
        write_beginning(begun, wordings(), 4)
    with pytest.raises(InputError, match="began with another .*tokenizer.json"):
        check_beginning(begun, ["A sentence that nobody asks."] * 200, 3)
    config = json.loads((begun / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_hidden_layers"] += 1
    (begun / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="began with another config.json"):
        check_beginning(begun, wordings(), 3)


def test_what_was_made_from_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    rows, result = tmp_path / "rows" / "one.train.jsonl", tmp_path / "result"
    rows.write_text("{}\n")

    def check(seed: int) -> None:
        check_origin(tmp_path, "result", [result], {"rows": rows_digest(tmp_path, ["one"]), "seed": seed})

    check(0)
    check(1)
    result.mkdir()
    check(1)
    with pytest.raises(
        InputError, match="result is outdated: seed changed from 1 to 2; delete .*result to make it anew"
    ):
        check(2)
    rows.write_text("{ }\n")
    with pytest.raises(InputError, match="outdated: rows changed; delete"):
        check(1)
    result.rmdir()
    check(1)
    with pytest.raises(InputError, match="two.train.jsonl is missing; run the stage data first"):
        rows_digest(tmp_path, ["one", "two"])
    # What an earlier version left.
    (tmp_path / "old").touch()
    check_origin(tmp_path, "old", [tmp_path / "old"], {"seed": 1})
    with pytest.raises(InputError, match="old is outdated"):
        check_origin(tmp_path, "old", [tmp_path / "old"], {"seed": 2})
    check_origin(tmp_path, "old", [tmp_path / "old"], {"seed": 1, "begin": "a"})
    with pytest.raises(InputError, match="old is outdated: begin changed; delete"):
        check_origin(tmp_path, "old", [tmp_path / "old"], {"seed": 1, "begin": "b"})


def test_what_the_talker_reads_of_a_frame_is_mostly_its_text() -> None:
    assert not drawn("talker.code_predictor.model.codec_embedding.3.weight", (128, 96), 0).any()
    assert drawn("talker.model.codec_embedding.weight", (1152, 96), 0).std() == pytest.approx(0.1, rel=0.05)
    text = drawn("talker.text_projection.linear_fc2.weight", (96, 192), 0)
    assert text.std() == pytest.approx(2.4 / 192**0.5, rel=0.05)
