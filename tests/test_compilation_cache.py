"""Compiled programs are kept where they should be, survive interruptions, and spare the second start its compiling."""

import os
import pwd
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

import convert
from omni_jax import compilation_cache as ours
from omni_jax.compilation_cache import (
    MAX_BYTES,
    SETTINGS,
    SWITCH,
    SWITCHED_ON,
    cache_directory,
    use_compilation_cache,
)
from omni_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without a cache, and leaves none."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    names = ("jax_compilation_cache_dir", *SETTINGS)
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_lie_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / ".cache/omni_jax/programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache/omni_jax/programs"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library/Caches/omni_jax/programs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/omni_jax/programs"


def test_the_switch_names_a_directory_or_turns_the_cache_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "~/mine")
    assert cache_directory() == tmp_path / "mine" / "omni_jax" / "programs"
    monkeypatch.setenv(SWITCH, "off")
    assert cache_directory() is None
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("switch", ["no", "0", "programs", "./programs", "~nobody-of-this-name/programs", __file__])
def test_a_switch_that_is_neither_is_refused(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, switch)
    with pytest.raises(InputError, match=f"{SWITCH} is '{switch}'; give an absolute path of a directory, or off"):
        use_compilation_cache()


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_directory_nothing_is_kept(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert cache_directory() is None


def test_a_compiled_program_is_kept_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES
    programs = tmp_path / "omni_jax" / "programs"
    assert programs.stat().st_mode & 0o777 == 0o700

    def program() -> float:
        return float(jax.jit(lambda x: jnp.sin(x) * 421.0)(1.0))

    first = program()
    (kept,) = programs.glob("jit__lambda*-cache")
    times = kept.with_name(kept.name.replace("-cache", "-atime"))
    before = times.read_bytes()
    jax.clear_caches()
    assert program() == first
    assert times.read_bytes() != before, "the program was compiled again, not read"


def test_a_cache_of_the_users_own_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "ours"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert jax.config.jax_compilation_cache_max_size != MAX_BYTES
    assert not (tmp_path / "ours").exists()


def test_a_setting_that_the_environment_states_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    use_compilation_cache()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_a_directory_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "omni_jax").write_text("")
    monkeypatch.setenv(SWITCH, str(tmp_path))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that the switch leads to; one of its programs is whole, and one is not if the size is bounded."""
    monkeypatch.setenv(SWITCH, str(tmp_path))
    directory = tmp_path / "omni_jax" / "programs"
    directory.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (directory / name).write_text("x")
    return directory


def test_what_an_interrupted_process_left_is_removed(programs: Path) -> None:
    use_compilation_cache()
    assert {path.name for path in programs.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_what_others_keep_in_the_same_directory_stays(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs-cache").write_text("x")
    use_compilation_cache()
    assert (tmp_path / "theirs-cache").exists()


def test_programs_stay_in_a_cache_of_any_size(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # Then JAX writes no times of last use.
    assert jax.config.jax_compilation_cache_max_size == -1
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(programs) and (programs / "torn-cache").exists()


def test_jax_may_be_told_to_keep_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path))
    before = jax.config.jax_enable_compilation_cache
    jax.config.update(SWITCHED_ON, False)
    try:
        use_compilation_cache()
    finally:
        jax.config.update(SWITCHED_ON, before)
    assert not [*tmp_path.iterdir()]


def test_a_cache_that_stays_locked_is_not_waited_for(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LOCK_SECONDS", 0.1)
    with FileLock(programs / ".lockfile"):
        waited = threading.Thread(target=use_compilation_cache, daemon=True)
        waited.start()
        waited.join(60)
        assert not waited.is_alive() and jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_a_second_start_compiles_nothing_even_after_two_at_once(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    convert.convert_checkpoint(checkpoints("tiny"), tmp_path / "checkpoint", progress=False)
    environment = {**os.environ, SWITCH: str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "omni_jax", "generate", "--model", str(tmp_path / "checkpoint"))
    command = (*command, "--text", "Good morning!", "--max-new-tokens", "4")

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(process: subprocess.Popen) -> str:
        answer, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
        assert "cache" not in messages and "Warning" not in messages
        return answer

    both = [start(), start()]
    answers = [result(process) for process in both]
    programs = tmp_path / "cache" / "omni_jax" / "programs"
    kept = {path.name for path in programs.glob("*-cache")}
    assert any(name.startswith("jit_decode_chunk") for name in kept)
    assert answers == [result(start())] * 2
    assert {path.name for path in programs.glob("*-cache")} == kept
