"""What the demonstration says aloud is understood by a recogniser that had no part in training."""

from typing import Any

import numpy as np
import pytest

from scripts.demo import Demo, said_aloud
from scripts.nano.judging import is_right
from scripts.nano.recogniser import recogniser
from scripts.nano.spoken import numbers_of, shuffled
from scripts.nano.words import DIGITS


@pytest.mark.slow
def test_the_numbers_of_the_answer_are_heard(omnis: Any) -> None:
    pytest.importorskip("pocketsphinx")
    # All strings of two digits, so that none is likelier to the recogniser than another.
    hear = recogniser([f"{one}, {other}." for one in DIGITS for other in DIGITS])
    row, reply, _ = said_aloud(omnis("nano"), Demo().speaker)
    told = numbers_of(row["answer"].split(", "))
    assert is_right(row, reply.text) and len(told) == 5
    assert numbers_of(hear(np.asarray(reply.audio), 24_000).split()) == told
    assert numbers_of(hear(shuffled(np.asarray(reply.audio), 0), 24_000).split()) != told
