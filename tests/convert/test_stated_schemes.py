"""Every field of every quantization_config with a value that nobody means is read, or ends in one clear error."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import CheckpointError
from omni_jax.quantization import KEY
from omni_jax.weights.schemes import stated_schemes
from tests.helpers.formats import FORMATS

FILE = Path("config.json")
NASTY = (None, True, False, 0, 5, -1, 1.5, -1.0, "", "yarn", [], [1], ["a"], [8, 16], {}, {"a": 1}, {"a": {"b": []}})
# Beside those that a format states.
MORE = (("dynamic",), ("extra_config",), ("extra_config", "lm_head"), ("sparsity_config",), ("transform_config",))
Keys = tuple[str, ...]


def paths(values: dict[str, Any], above: Keys = ()) -> Iterator[Keys]:
    """The way to every field, those inside others too."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def changed(values: dict[str, Any], path: Keys, value: Any) -> dict[str, Any]:
    """`values` with another value at the end of a path."""
    name, *below = path
    return values | {name: changed(values.get(name) or {}, tuple(below), value) if below else value}


def refusals(config: dict[str, Any]) -> Iterator[str]:
    """The errors of a config of which one field was changed."""
    for path in (*paths(config), *MORE):
        for value in NASTY:
            try:
                stated_schemes({KEY: changed(config, path, value)}, FILE)
            except CheckpointError as error:
                yield str(error)


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_of_a_field_ends_in_another_error(name: str) -> None:
    said = [*refusals(FORMATS[name][0])]
    assert len(said) > 10
    for one in said:
        assert re.match(rf"config.json: {KEY}\..* is .*[;:] take the unquantised release, or one in a format", one)


@pytest.mark.parametrize("value", NASTY, ids=str)
def test_no_value_of_the_whole_ends_in_another_error(value: Any) -> None:
    if value is None:
        assert stated_schemes({KEY: value}, FILE) is None
        return
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config(\.quant_method)? is "):
        stated_schemes({KEY: value}, FILE)
