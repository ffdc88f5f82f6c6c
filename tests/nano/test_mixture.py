"""The last rows of the Thinker: their shares, what is given again, and that they stay those of their origin."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omni_jax.errors import InputError
from scripts.nano import mixture
from scripts.nano.mixture import SMALL, loosened
from scripts.nano.rows import assistant, rows_path, user


def write_rows(directory: Path, sense: str, number: int) -> None:
    path = rows_path(directory, sense, "train")
    path.parent.mkdir(exist_ok=True)
    rows = ({"messages": [user(f"{i}"), assistant(sense)], "sense": sense, "answer": "x"} for i in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_senses_have_their_shares_in_a_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "SHARES", {"read": 26.0, "same": 6.0})
    monkeypatch.setattr(mixture, "OTHERS", 2.5)
    for sense, number in (("read", 1000), ("same", 30), ("written", 1000)):
        write_rows(tmp_path, sense, number)
    file = mixture.write_mixture(tmp_path, ("read", "same", "written"), 345, 0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("messages",)}
    said = [row["messages"][1]["content"] for row in rows]
    assert Counter(said) == {"read": 260, "same": 60, "written": 25}
    assert 0.6 < Counter(said[:100])["read"] / 100 < 0.9
    asked = Counter((row["messages"][0]["content"][0]["text"], row["messages"][1]["content"]) for row in rows)
    assert max(asked.values()) == 2 and all(count == 2 for (_, sense), count in asked.items() if sense == "same")

    written = file.stat().st_mtime_ns
    assert mixture.write_mixture(tmp_path, ("read", "same", "written"), 345, 0).stat().st_mtime_ns == written
    write_rows(tmp_path, "same", 31)
    with pytest.raises(InputError, match="outdated: rows changed"):
        mixture.write_mixture(tmp_path, ("read", "same", "written"), 345, 0)


def test_questions_beside_media_lose_small_words_alone() -> None:
    picture, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "Tell me what is on the left."}
    messages = [
        {"role": "user", "content": [picture, text]},
        {"role": "assistant", "content": "A ring is on the left."},
        {"role": "user", "content": [text]},
    ]
    draw, found = np.random.default_rng(0), set()
    for _ in range(200):
        first, *others = loosened(draw, messages)
        assert others == messages[1:] and first["content"][0] == picture
        found.add(first["content"][1]["text"])
    kept = {tuple(word for word in one.split() if word.lower().strip(".") not in SMALL) for one in found}
    assert text["text"] in found and len(found) > 10 and kept == {("on", "left.")}
    assert messages[0]["content"][1] == text
