"""The delays of a server: measured against a real one, and refused where they could not be measured."""

from pathlib import Path

import pytest

from omni_jax.errors import InputError
from scripts.bench import delays
from scripts.bench.options import Delays


@pytest.mark.slow
def test_delays_of_a_real_server(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    delays.report(Delays(model=Path("nano"), streams=2, words=150, new=2000, repeats=1, warm_up=1))
    found = {line[:52].strip(): float(line[52:]) for line in capsys.readouterr().out.splitlines()}
    assert 150 <= found["tokens of the long prompt"] < 200 and found["its first token, ms"] > 0
    assert 0 < found["longest gap while the prompt is read, ms"] <= found["longest gap of all, ms"]
    assert found["times sooner"] == pytest.approx(
        found["first turn, first token, ms"] / found["second turn, first token, ms"], rel=0.01
    )


def test_texts_differ_and_are_as_long_as_asked() -> None:
    one, other = (delays.words(50, [seed]) for seed in (0, 1))
    assert len(one.split()) == len(other.split()) == 50 and one != other


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="--url of a server that runs, or a --model"):
        Delays()
    with pytest.raises(InputError, match="streams"):
        Delays(model=Path("nano"), streams=0)
