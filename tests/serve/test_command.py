"""The flags of the server."""

import re
from dataclasses import fields

import pytest
import tyro

from omni_jax.serve.command import ListenFlags, Serve, _doors
from omni_jax.serve.guard import OPEN


def test_help_shows_flags_that_can_be_used(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Serve, args=["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{one.name.replace('_', '-')}" in shown for one in fields(ListenFlags))
    assert "--seed " not in shown
    assert OPEN == ("/health", "/") and "but for /health and the page at /;" in re.sub(r"[\s│]+", " ", shown)
    with pytest.raises(SystemExit):
        tyro.cli(Serve, args=["--model", "m", "--seed", "1"])
    assert "seed" not in tyro.cli(Serve, args=["--model", "m", "--temperature", "0.5"]).settings()


def test_names_of_the_server_are_checked_where_no_key_is():
    plain, named = ListenFlags(), ListenFlags(allowed_hosts=("Omni.example.com",), allowed_origins=("https://A.com/",))
    assert (_doors(plain, None).any_host, _doors(plain, "k").any_host, _doors(named, "k").any_host) == (
        False,
        True,
        False,
    )
    assert _doors(named, None).hosts == ("omni.example.com",) and _doors(named, None).origins == ("https://a.com",)
