"""`omni-jax train regenerate`: from flags to a file of replies that the model gives to the prompts of training data."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from omni_jax.errors import InputError
from omni_jax.files import user_path
from omni_jax.flags import DeviceFlags, EndingFlags, MediaFlags, PreparationFlags, SamplingFlags, keywords_of
from omni_jax.printing import report_mesh
from omni_jax.rows.files import data_files, digest_of, rows_of
from omni_jax.rows.row import plain_row
from omni_jax.settings import Settings
from omni_jax.train.data.forms import read_example
from omni_jax.train.regenerate import Conversation, regenerate
from omni_jax.weights.drafters import load_drafter


@dataclass(frozen=True, kw_only=True)
class Regenerate:
    """Have the model answer the prompts of training data anew, as a drafter is to learn what the model says."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    data: tuple[Path, ...]
    """Files of conversations, one JSON object per line, or directories of them."""
    output: Path
    """The .jsonl to be written; that of a stopped run is gone on with."""
    slots: int | None = None
    """Conversations that are answered at a time; by default 12, or what memory holds."""
    drafter: Path | None = None
    """Directory of a drafter for this model: the same replies in fewer steps."""
    fatal: bool = False
    """Stop at the first row that cannot be used, which is otherwise reported and left out."""
    ending: OmitArgPrefixes[EndingFlags] = field(default_factory=EndingFlags)
    sampling: OmitArgPrefixes[SamplingFlags] = field(default_factory=SamplingFlags)
    prompt: OmitArgPrefixes[PreparationFlags] = field(default_factory=PreparationFlags)
    media: OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    devices: OmitArgPrefixes[DeviceFlags] = field(default_factory=DeviceFlags)


def run_regenerate(command: Regenerate) -> None:
    """Answer all rows that the output does not hold, and print what came of it."""
    import omni_jax

    keywords = keywords_of(command.media, command.ending, command.sampling, command.prompt)
    settings = Settings.read(keywords)
    files = [file for path in command.data for file in data_files(user_path(path, "the dataset"), None)]
    devices = command.devices
    held = {name: way for name in ("dtype", "quantize") if (way := getattr(devices, name)) is not None}
    about = {"model": str(command.model), "data": digest_of(files), **held}
    about |= json.loads(json.dumps(keywords, default=list))
    drafter = None if command.drafter is None else load_drafter(command.drafter)
    omni = omni_jax.load(command.model, parts=("thinker",), mesh=devices.mesh, **held)
    report_mesh(omni)
    left_out: list[str] = []
    done = regenerate(
        omni, _conversations(files, command.fatal, left_out), command.output, settings,
        about=about, slots=command.slots, drafter=drafter, fatal=command.fatal,
    )  # fmt: skip
    answered = f"{done.answered} conversations answered"
    print(f"{answered}, {done.before} before, {len(done.left_out) + len(left_out)} left out: {command.output}")


def _conversations(files: list[Path], fatal: bool, left_out: list[str]) -> Iterator[Conversation]:
    """The rows as conversations; those that are none are reported, or end the run."""
    for where, folder, row in rows_of(files):
        try:
            example = read_example(plain_row(row), folder)
            if example.text is not None:
                raise InputError("a plain text has no prompt; give conversations")
        except InputError as error:
            if fatal:
                raise InputError(f"{where}: {error}") from error
            left_out.append(where)
            print(f"left out: {where}: {error}", file=sys.stderr)
            continue
        yield Conversation(where, example.messages, example.tools, example.silent)
