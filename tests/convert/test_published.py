"""A checkpoint in the form in which the model is published, and what conversion asks for before it reads any tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert.convert
from convert import convert_checkpoint, reverse_checkpoint, verify_checkpoint
from omni_jax import loading
from omni_jax.errors import OmniError
from scripts.small.tokenizer import publish
from tests.convert.conftest import INDEX, as_first_format

MESSAGES = [{"role": "user", "content": "What is <|im_end|> in 中文, Ελληνικά or العربية?\n  x = 3.14159 🙂"}]


@pytest.fixture
def published(source: Path) -> Path:
    """The "small" checkpoint in the public form: vocab.json, merges.txt, chat_template.json, shards with an index."""
    publish(source)
    assert (source / INDEX).exists() and (source / "generation_config.json").exists()
    assert not (source / "tokenizer.json").exists() and (source / "chat_template.json").exists()
    return source


def test_the_published_form_converts_and_loads(published: Path, omnis: Callable[[str], Any], tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    convert_checkpoint(published, ours)
    small = {path.name for path in ours.iterdir() if path.is_file()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"} < small
    omni, saved = loading.load(ours), omnis("small")
    ids = omni.prepare(MESSAGES).token_ids
    np.testing.assert_array_equal(ids, saved.prepare(MESSAGES).token_ids)
    one, other = (model.generate(MESSAGES, max_new_tokens=4) for model in (omni, saved))
    assert one.token_ids == other.token_ids
    assert verify_checkpoint(ours) == 485
    reverse_checkpoint(ours, tmp_path / "back")
    assert {path.name for path in published.iterdir() if not path.name.endswith(("safetensors", INDEX))} == {
        path.name for path in (tmp_path / "back").iterdir() if not path.name.endswith("safetensors")
    }


def test_an_existing_conversion_without_tokenizer_json_loads(published: Path, converted: Path, tmp_path: Path) -> None:
    """Conversions of the first format copied the parts too; they lacked a reader."""
    old = Path(shutil.copytree(converted, tmp_path / "old"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (old / name).unlink()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        shutil.copyfile(published / name, old / name)
    assert loading.load(as_first_format(old), parts=("thinker",)).prepare(MESSAGES).token_ids.size


@pytest.mark.parametrize(
    "missing, words",
    [
        (["vocab.json"], ("vocab.json", "copy")),
        (["merges.txt"], ("merges.txt", "copy")),
        (["vocab.json", "merges.txt", "tokenizer_config.json"], ("no tokenizer", "copy")),
        (["chat_template.json"], ("no chat template", "copy")),
        (["preprocessor_config.json"], ("preprocessor_config.json", "copy")),
        (["config.json"], ("config.json is missing", "take it from the checkpoint")),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_loading_needs_is_missed_before_any_tensor_is_read(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(convert.convert, "read_block", None)
    for name in missing:
        (published / name).unlink()
    with pytest.raises(OmniError) as caught:
        convert_checkpoint(published, tmp_path / "ours")
    assert all(word in str(caught.value) for word in words), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_that_cannot_be_used_are_told_before_any_tensor_is_read(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.convert, "read_block", None)
    (published / "chat_template.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(OmniError, match="chat_template.json"):
        convert_checkpoint(published, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
