"""Flags of media options: each option has one, and each reaches the call by the option's name."""

from dataclasses import fields

import pytest
import tyro

from omni_jax.ask import Generate, Stream, _settings
from omni_jax.flags import MediaFlags
from omni_jax.inputs.options import Options, read_options

# Options that flags of their own hold already.
ELSEWHERE = {"fps", "use_audio_in_video"}
NAMED = list(enumerate(sorted({field.name for field in fields(Options)} - ELSEWHERE)))


@pytest.mark.parametrize("command", [Generate, Stream])
@pytest.mark.parametrize("number, name", NAMED)
def test_every_option_has_a_flag(command, number, name):
    flag = "--" + name.replace("_frames", "_video_frames").replace("_", "-")
    args = ["--model", "m", flag, str(8 + number), "--max-frames", "7"]
    ask = tyro.cli(command, args=args, config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff))
    settings = _settings(ask, None)
    assert settings["media"] == {name: 8 + number} and settings["max_frames"] == 7
    if not name.startswith("resized"):  # which go together
        assert getattr(read_options(settings["media"], "flags"), name) == 8 + number


def test_nothing_is_stated_by_default():
    assert MediaFlags().options() == {}
