"""Compiled programs are kept where they should be, survive interruptions, and spare the second start its compiling."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import convert
from omni_jax.compilation_cache import MAX_BYTES, SETTINGS, SWITCH, cache_directory, use_compilation_cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without a cache, and leaves none."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    names = ("jax_compilation_cache_dir", *SETTINGS)
    before = {name: getattr(jax.config, name) for name in names}
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
    monkeypatch.setenv(SWITCH, "~/programs")
    assert cache_directory() == tmp_path / "programs"
    monkeypatch.setenv(SWITCH, "Off")
    assert cache_directory() is None
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_without_a_home_directory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_directory() is None


def test_a_compiled_program_is_kept_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "programs"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700

    def program() -> float:
        return float(jax.jit(lambda x: jnp.sin(x) * 421.0)(1.0))

    first = program()
    (kept,) = (tmp_path / "programs").glob("jit__lambda*-cache")
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
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(SWITCH, str(tmp_path / "file" / "programs"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_what_an_interrupted_process_left_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (tmp_path / name).write_text("x")
    monkeypatch.setenv(SWITCH, str(tmp_path))
    use_compilation_cache()
    assert {path.name for path in tmp_path.glob("*-*")} == {"whole-cache", "whole-atime"}


@pytest.mark.slow
def test_a_second_start_compiles_nothing_even_after_two_at_once(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    convert.convert_checkpoint(checkpoints("tiny"), tmp_path / "checkpoint", progress=False)
    environment = {**os.environ, SWITCH: str(tmp_path / "programs"), "PYTHONPATH": str(ROOT)}
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
    kept = {path.name for path in (tmp_path / "programs").glob("*-cache")}
    assert any(name.startswith("jit_decode_chunk") for name in kept)
    assert answers == [result(start())] * 2
    assert {path.name for path in (tmp_path / "programs").glob("*-cache")} == kept
