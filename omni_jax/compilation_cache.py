"""Compiled programs on disk, so that a command which starts again does not compile again.

JAX keeps them under keys that cover the program, its own version, the XLA flags and the devices (on CPU the processor's
features too). This module says where: in `omni_jax/programs` of the directory that `$OMNI_JAX_CACHE` names ("off" for
none), else of the user's cache directory, which is `$XDG_CACHE_HOME`, `~/Library/Caches` on macOS, else `~/.cache`.
What else is in those directories is not touched. A directory that the user gave to JAX itself
(`JAX_COMPILATION_CACHE_DIR`) stays as it is. The files are code: whoever can write there can have it run.
"""

import os
import sys
from pathlib import Path

import jax

from omni_jax.errors import InputError

SWITCH = "OMNI_JAX_CACHE"
MAX_BYTES = 4 * 1024**3  # the programs used longest ago are removed first
LOCK_SECONDS = 10
SWITCHED_ON = "jax_enable_compilation_cache"  # JAX's own switch

# Small programs too: their compilation takes most of a small model's start.
SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def use_compilation_cache() -> None:
    """Let JAX keep what it compiles from now on; where that is impossible, programs are compiled at each start.

    Does nothing if a directory is set already. A setting that the environment states for JAX keeps its value. Raises
    InputError for a switch that is neither "off" nor an absolute path.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) or not getattr(jax.config, SWITCHED_ON, True):
        return
    directory = cache_directory()
    if directory is None:
        return
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if _prepare(directory):
        jax.config.update("jax_compilation_cache_dir", str(directory))


def cache_directory() -> Path | None:
    """Where compiled programs are kept; None if they are not, or if there is no home directory."""
    stated = os.environ.get(SWITCH, "")
    if stated == "off":
        return None
    if stated:
        shared = Path(os.path.expanduser(stated))
        if not shared.is_absolute() or shared.is_file():
            raise InputError(f"{SWITCH} is {stated!r}; give an absolute path of a directory, or off for no cache")
    else:
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not shared.is_absolute():  # a relative one is to be ignored, says its specification
            home = os.path.expanduser("~")
            if not os.path.isabs(home) or home == "/":
                return None
            shared = Path(home) / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return shared / "omni_jax" / "programs"


def _prepare(directory: Path) -> bool:
    """Make the directory and remove what an interrupted process left half written; return whether it can be used.

    Unless the size of the cache is unlimited, JAX writes the time of last use ("-atime") after each program, under the
    same lock. A program without it is not whole, and would neither be read nor be written again.
    """
    from filelock import FileLock

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if getattr(jax.config, "jax_compilation_cache_max_size", MAX_BYTES) != -1:
            with FileLock(directory / ".lockfile", timeout=LOCK_SECONDS):
                for program in directory.glob("*-cache"):
                    if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                        program.unlink()
    except (OSError, NotImplementedError):  # unwritable, locked for too long, or a file system without locks
        return False
    return os.access(directory, os.W_OK)
