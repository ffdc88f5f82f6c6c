"""What results of a stage were made from, so that no stage goes on with what is outdated.

    made_from/<result>.json: {"rows": digest, "thinker/model": identity, "seed": 0, ...}

It is written before the result is begun. A result without such a file is taken as made from what is there now, and so
is one whose file lacks a name, as those of earlier versions may.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.weights.manifest import identity


def check_origin(directory: Path, name: str, results: Sequence[Path], origin: Mapping[str, Any]) -> None:
    """Note what `results` are made from; InputError if they are there and were made from something else.

    origin: digests of inputs and values of settings, by what a message calls them.
    """
    record = directory / "made_from" / f"{name}.json"
    there = [str(path) for path in results if path.exists()]
    held = json.loads(record.read_text()) if record.exists() else {}
    changed = sorted(name for name in held if held[name] != origin.get(name))
    if there and changed:
        was = " and ".join(_change(name, held[name], origin.get(name)) for name in changed)
        raise InputError(f"{there[0]} is outdated: {was}; delete {' and '.join(there)} to make it anew")
    if held != origin:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(origin, indent=1) + "\n")


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of the names and contents of files; InputError for one that is missing."""
    digest = sha256()
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing; run the stage that writes it first")
        digest.update(f"{path.name}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def model_of(directory: Path, stage: str) -> str:
    """The identity of the model in a directory; InputError, naming the stage that writes it, if it is missing."""
    if not directory.is_dir():
        raise InputError(f"{directory} is missing; run the stage {stage} first")
    return identity(directory)


def _change(name: str, held: Any, now: Any) -> str:
    return f"{name} changed" if isinstance(now, str) else f"{name} changed from {held} to {now}"
