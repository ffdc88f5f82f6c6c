"""Every key of every configuration file with a value that nobody means: one clear error, or a configuration that holds.

Each key is tried with each value, and pairs of keys at random (from a fixed seed).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import OmniConfig
from omni_jax.draft_config import read_draft_config
from omni_jax.errors import ConfigError
from omni_jax.inputs.settings import AudioSettings, ImageSettings, VideoSettings
from scripts.small.configs import PUBLIC_DFLASH
from scripts.small.drafter import draft_config_dict

DATA = Path(__file__).parent / "data"
ABSENT = object()
NASTY = (
    ABSENT, None, True, 0, 1, -1, 7, 24.0, 1.5, 1e-320, 1e300, nan, -inf, 10**9, 10**400, "", "yarn", "x" * 10**5,
    [], ["a"], [0, 0, 0], [1.5, True, None], [24, 20, 20, 0], [-8, 16, 24], [10**400] * 3,
    {}, {"a\n\x1b": {"b": None}}, {"Ethan": 2302, "ethan": 2302},
)  # fmt: skip
MOST = 10**9


def _settings(values: dict) -> dict:
    return {kind.__name__: asdict(kind.from_hf(values)) for kind in (ImageSettings, VideoSettings, AudioSettings)}


FILES: dict[str, tuple[dict, Callable[[dict], Any]]] = {
    "config": (json.loads((DATA / "public_config.json").read_text()), lambda v: asdict(OmniConfig.from_hf(v))),
    "preprocessor": (json.loads((DATA / "public_preprocessor_config.json").read_text()), _settings),
    "dflash": (PUBLIC_DFLASH, lambda v: asdict(read_draft_config(v))),
    "eagle3": (draft_config_dict("tiny", "eagle3"), lambda v: asdict(read_draft_config(v))),
}
Keys = tuple[str, ...]


def _paths(values: dict, above: Keys = ()) -> Iterator[Keys]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _paths(value, (*above, name))


def _changed(values: dict, path: Keys, value: Any) -> dict:
    """`values` with another value under `path`, or none; as they are where an earlier change took the way there."""
    name, *below = path
    if below:
        inner = values.get(name)
        return {**values, name: _changed(inner, tuple(below), value)} if isinstance(inner, dict) else values
    return {key: v for key, v in values.items() if key != name} | ({} if value is ABSENT else {name: value})


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


def _refused_or_sound(file: str, values: dict) -> None:
    """No other error than ConfigError, in one short line that names the file, and no number without bounds."""
    try:
        config = FILES[file][1](values)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(("config.json: ", "preprocessor_config.json: ")) and len(message) < 500
        assert "\n" not in message
    else:
        assert all(isfinite(number) and -MOST <= number <= MOST * 1000 for number in _numbers(config))


@pytest.mark.parametrize("file", FILES)
def test_the_files_themselves_are_accepted(file: str) -> None:
    assert FILES[file][1](FILES[file][0])


@pytest.mark.parametrize("file", FILES)
def test_each_key_with_each_nasty_value(file: str) -> None:
    for path in _paths(FILES[file][0]):
        for value in NASTY:
            _refused_or_sound(file, _changed(FILES[file][0], path, value))


@pytest.mark.parametrize("file", FILES)
def test_nasty_values_in_company(file: str) -> None:
    paths = st.sampled_from(list(_paths(FILES[file][0])))

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.tuples(paths, st.sampled_from(NASTY)), min_size=2, max_size=4))
    def try_them(changes: list[tuple[Keys, Any]]) -> None:
        values = FILES[file][0]
        for path, value in changes:
            values = _changed(values, path, value)
        _refused_or_sound(file, values)

    try_them()


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_section(file: str) -> None:
    for value in (None, True, 5, "", "{}", [], [{}]):
        with pytest.raises(ConfigError, match=r"config\.json"):
            FILES[file][1](value)
