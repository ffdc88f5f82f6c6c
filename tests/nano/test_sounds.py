"""Programs that write sounds: one that is missing, fails or writes nothing is named, with what to do."""

import sys
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from scripts.nano import sounds
from scripts.nano.sounds import run_synthesiser


def test_a_program_that_writes_its_files_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "said.wav"
    run_synthesiser([sys.executable, "-c", f"open({str(file)!r}, 'w')"], [file])


def test_a_program_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="flite is missing; install the Debian package flite"):
        sounds.synthesised("Two.", "slt", 16_000)
    flite = tmp_path / "flite"
    for acts, why in (("echo no voice >&2; exit 1", "no voice"), ("exit 3", "said.wav is not there"), ("", "said.wav")):
        flite.write_text(f"#!/bin/sh\n{acts}\n")
        flite.chmod(0o755)
        with pytest.raises(InputError, match=f"flite failed: .*{why}.*; see that the disk has room, or install the"):
            sounds.synthesised("Two.", "slt", 16_000)
