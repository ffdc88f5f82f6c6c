"""Where a checkpoint is: from what a user names, a directory or a model id, to a directory that exists.

    "ckpt/", a snapshot of the hub's cache   the directory itself
    "nano", "nano/dflash", "nano/eagle3"     the small trained model that the package holds, and its drafters
    "Qwen/Qwen3-Omni-30B-A3B-Instruct"       its snapshot in the hub's cache, downloaded if the hub can be reached

A model id needs the package huggingface_hub, which is imported here alone. With HF_HUB_OFFLINE, or without a network,
the snapshot that the cache holds is taken, unless the hub's package knows of files that it lacks.
"""

import os
import re
from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of, user_path
from omni_jax.weights.contents import LOADED, MANIFEST, PARAMS

# The small trained model, a Hugging Face directory in the package; its drafters are in folders of their own in it.
NANO = Path(__file__).resolve().parents[1] / "nano"
DRAFTERS = ("dflash", "eagle3")
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# What is downloaded of a model: weights (in `params/` if it is converted), configuration, tokenizer and template; no
# pickles and no code.
PATTERNS = ["*.safetensors", f"{PARAMS}/*", "*.json", "*.jinja", "*.txt"]


def locate(where: Any, what: str = "the model") -> Path:
    """The directory that a user means by a path, a model id or a name of the package's own model; it is not opened.

    Args:
        where: text or path object. A directory here is preferred to a model of the same name elsewhere.
        what: what is looked for, for errors about the type of `where`.

    CheckpointError for what is neither a directory nor a model that the package, the hub or its cache has.
    """
    path = user_path(where, what)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: not a directory; name the one that the file is in")
    name = path.as_posix()
    if name in ("nano", *(f"nano/{kind}" for kind in DRAFTERS)):
        return _packaged(name)
    if not MODEL_ID.fullmatch(name):
        raise CheckpointError(f"{path}: no such directory")
    return _snapshot(name)


def _packaged(name: str) -> Path:
    """The directory of nano or of one of its drafters; CheckpointError if the installation lacks it."""
    directory = NANO.parent / name
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no such directory here, and this installation lacks it in {directory}; install omni_jax again"
        )
    return directory


def _snapshot(model_id: str) -> Path:
    """The snapshot of a model in the hub's cache, brought up to date if the hub can be reached."""
    try:
        from huggingface_hub import constants, is_offline_mode, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{model_id}: no such directory; to load it as a model id of the Hugging Face hub, install omni_jax[hub]"
        ) from None
    try:
        return Path(snapshot_download(model_id, allow_patterns=PATTERNS))
    except MemoryError:
        raise
    except Exception as error:
        if found := getattr(error, "snapshot_path", None):
            return _complete(Path(found), error)
        absent = f"neither a directory here nor a model in the Hugging Face cache {constants.HF_HUB_CACHE}"
        if is_offline_mode():
            reason = f"{absent}; unset HF_HUB_OFFLINE to download it"
        elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            reason = "the hub shows no such model; for a private or gated one, log in with `hf auth login`"
        elif isinstance(error, FileNotFoundError):
            reason = f"{absent}, and the hub cannot be reached; check the network"
        else:
            reason = f"cannot be downloaded ({reason_of(error)})"
        raise CheckpointError(f"{model_id}: {reason}") from error


def _complete(snapshot: Path, error: Exception) -> Path:
    """A snapshot that the hub's package calls incomplete, if loading reads nothing that is missing; CheckpointError."""
    missing = str(error).partition("missing (")[2].partition("). ")[0]
    names, weights = missing.split(", "), (".safetensors", ".index.json")
    needed = [
        n for n in names if n in (*LOADED, MANIFEST) or n.endswith(weights) or n.startswith((f"{PARAMS}/", "..."))
    ]
    if needed:
        raise CheckpointError(f"{snapshot}: not downloaded completely, {missing} missing; download the model again")
    return snapshot
