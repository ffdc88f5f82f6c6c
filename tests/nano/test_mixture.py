"""The last rows of the Thinker: their shares, what is given again, and that they stay those of their origin."""

import json
from collections import Counter
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from scripts.nano import mixture
from scripts.nano.rows import assistant, rows_path, user


def write_rows(directory: Path, sense: str, number: int) -> None:
    path = rows_path(directory, sense, "train")
    path.parent.mkdir(exist_ok=True)
    rows = ({"messages": [user(f"{i}"), assistant(sense)], "sense": sense, "answer": "x"} for i in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_senses_have_their_shares_in_a_random_order(tmp_path: Path) -> None:
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
