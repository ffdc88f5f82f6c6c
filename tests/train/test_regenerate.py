"""Replies that the target gives anew: which are asked for, what is kept, and what a stopped run leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.inputs.processor import Processor
from omni_jax.settings import Settings
from omni_jax.train.data.forms import COLUMNS, read_example
from omni_jax.train.regenerate import Conversation, Regenerated, regenerate
from scripts.small.configs import config_dict
from tests.evaluate.stub import StubOmni

CONFIG = OmniConfig.from_hf(config_dict("tiny"))


def said(*turns: str) -> list[dict[str, Any]]:
    """A conversation of "role: text" turns."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": text} for role, text in pairs]


def run(conversations: list, output: Path, omni: StubOmni | None = None, **settings: Any) -> Regenerated:
    given = [Conversation(f"rows.jsonl:{i + 1}", messages) for i, messages in enumerate(conversations)]
    made: Any = omni or StubOmni(CONFIG)
    about = settings.pop("about", {"model": "one"})
    fatal = settings.pop("fatal", False)
    return regenerate(made, given, output, Settings.read(settings), about=about, slots=2, fatal=fatal)


def lines(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["source"])


def test_every_reply_is_made_anew_and_read_by_the_next(tmp_path: Path) -> None:
    """The stub answers with the last question."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    conversations = [
        said("system: S", "user: one", "assistant: old", "user: two", "assistant: old"),
        said("user: three"),
        [*said("user: four"), call, *said("tool: 4", "assistant: old")],
    ]
    omni = StubOmni(CONFIG)
    done = run(conversations, tmp_path / "out.jsonl", omni)
    assert done == Regenerated(3, 0, [])
    first, second, third = lines(tmp_path / "out.jsonl")
    assert first["messages"] == said("system: S", "user: one", "assistant: one", "user: two", "assistant: two")
    assert second["messages"] == said("user: three", "assistant: three")
    assert third["messages"] == [*said("user: four"), call, *said("tool: 4", "assistant: 4")]
    assert first["token_ids"] == [[ord(c) for c in "one"], [ord(c) for c in "two"]]
    assert first["finish_reasons"] == ["stop", "stop"] and first["source"] == "rows.jsonl:1"
    assert len({prompt.seed for prompt in omni.prompts}) == 4


def test_replies_that_are_not_learned_stay(tmp_path: Path, checkpoints: Any) -> None:
    turns = said("user: one", "assistant: shown", "user: two", "assistant: old")
    given = [Conversation("rows.jsonl:1", turns, silent=frozenset({1}))]
    given += [Conversation("rows.jsonl:2", turns[:2], silent=frozenset({1})), Conversation("rows.jsonl:3", [])]
    made: Any = StubOmni(CONFIG, Processor.from_dir(checkpoints("tiny"), CONFIG))
    done = regenerate(made, given, tmp_path / "out.jsonl", Settings.read({}), about={}, slots=2)
    assert done.answered == 1 and "rows.jsonl:2: no reply of the row is to be learned" in done.left_out[0]
    assert done.left_out[1].startswith("rows.jsonl:3: ") and "empty" in done.left_out[1]
    (line,) = lines(tmp_path / "out.jsonl")
    assert line["messages"] == [turns[0], turns[1] | {"loss": False}, turns[2], *said("assistant: two")]
    assert read_example(line, tmp_path).silent == {1} and not COLUMNS.check(line)


def test_media_stay_in_the_prompt_and_the_output(tmp_path: Path, checkpoints: Any) -> None:
    picture = {"type": "image", "image": str(Path(__file__).parents[1] / "data" / "chelsea.png")}
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    omni = StubOmni(CONFIG, Processor.from_dir(checkpoints("tiny"), CONFIG))
    run([asked], tmp_path / "out.jsonl", omni, media={"max_pixels": 4096})
    (line,) = lines(tmp_path / "out.jsonl")
    assert line["messages"] == [*asked, {"role": "assistant", "content": "What is it?"}]
    assert omni.asked["prepare"][0]["media"] == {"max_pixels": 4096}


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """At any byte of the output: what is whole stays, and the rest is done again."""
    conversations = [said(f"user: question {i}") for i in range(6)]
    run(conversations, tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    about = (tmp_path / "whole.jsonl.about.json").read_bytes()
    for cut in np.random.default_rng(0).integers(0, len(content), 10):
        output = tmp_path / "cut.jsonl"
        output.write_bytes(content[:cut])
        output.with_name("cut.jsonl.about.json").write_bytes(about)
        done = run(conversations, output)
        assert done.before == content[:cut].count(b"\n") and done.before + done.answered == 6
        assert lines(output) == lines(tmp_path / "whole.jsonl")


def test_replies_of_something_else_are_not_mixed(tmp_path: Path) -> None:
    run([said("user: one")], tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InputError, match="replies of other model; choose another output"):
        run([said("user: two")], tmp_path / "out.jsonl", about={"model": "another"})
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_cannot_be_asked_is_left_out_or_fatal(tmp_path: Path, checkpoints: Any) -> None:
    missing = [{"role": "user", "content": [{"type": "image", "image": "missing.png"}, {"type": "text", "text": "?"}]}]
    omni = StubOmni(CONFIG, Processor.from_dir(checkpoints("tiny"), CONFIG))
    done = run([said("user: one"), missing, said("user: two")], tmp_path / "out.jsonl", omni)
    assert done.answered == 2 and len(done.left_out) == 1
    assert done.left_out[0].startswith("rows.jsonl:2: ") and "missing.png" in done.left_out[0]
    with pytest.raises(InputError, match=r"rows.jsonl:2: .*missing.png"):
        run([said("user: one"), missing], tmp_path / "fatal.jsonl", omni, fatal=True)
