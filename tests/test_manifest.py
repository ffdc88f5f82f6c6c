"""A checkpoint knows its own files: every changed bit is noticed, and models are told apart."""

import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert import MismatchError, convert_checkpoint, reverse_checkpoint, verify_checkpoint
from omni_jax import process
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs import settings, template, vocabulary
from omni_jax.loading import load
from omni_jax.weights import checkpoint, contents
from omni_jax.weights.contents import LOADED, MANIFEST, PARAMS, record_files
from omni_jax.weights.manifest import SMALL_BYTES, identity, read_manifest
from tests.convert.conftest import as_first_format, edit_manifest

FLIPS = 40


@pytest.fixture(scope="module")
def ours(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The "small" checkpoint converted, for reading only."""
    directory = tmp_path_factory.mktemp("manifest") / "small"
    convert_checkpoint(checkpoints("small"), directory)
    return directory


@pytest.fixture
def damaged(ours: Path, tmp_path: Path) -> Path:
    """A private copy."""
    return Path(shutil.copytree(ours, tmp_path / "damaged"))


def flips(directory: Path) -> Iterator[Path]:
    """Flip bits, one at a time and undone afterwards, in all files in turn; yields the file."""
    files, draw = sorted(path for path in directory.rglob("*") if path.is_file()), random.Random(11)
    for i in range(FLIPS):
        path = files[i % len(files)]
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        yield path
        path.write_bytes(data)


def test_every_flipped_bit_is_noticed(damaged: Path) -> None:
    """By verification in any file, by loading in the small ones."""
    kinds = set()
    for path in flips(damaged):
        with pytest.raises(CheckpointError):
            verify_checkpoint(damaged)
        if path.stat().st_size <= SMALL_BYTES:
            with pytest.raises(CheckpointError, match=str(damaged)):
                load(damaged, parts=("code2wav",))
            kinds.add(path.parent)
    assert len(kinds) >= 3
    assert verify_checkpoint(damaged) == 485


def test_every_file_is_recorded(ours: Path) -> None:
    files = {path.relative_to(ours).as_posix() for path in ours.rglob("*") if path.is_file()}
    manifest = read_manifest(ours)
    assert manifest.files.keys() == files - {MANIFEST}
    assert {*manifest.small_files()} | {*manifest.array_files()} == {*manifest.files}
    assert {"config.json", "tokenizer.json"} < manifest.small_files().keys()
    assert f"{PARAMS}/_METADATA" in manifest.array_files()


def test_a_checkpoint_of_the_first_format_is_read(damaged: Path) -> None:
    as_first_format(damaged)
    assert read_manifest(damaged).files == {} and verify_checkpoint(damaged) == 485
    assert set(checkpoint.restore(damaged, ("code2wav",))) == {"code2wav"}
    (damaged / "notes.txt").write_text("mine")
    assert load(damaged, parts=("code2wav",)).params.keys() == {"code2wav"}


def test_arrays_of_another_checkpoint(damaged: Path, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    convert_checkpoint(checkpoints("small"), tmp_path / "other", dtype="bfloat16")
    shutil.rmtree(damaged / PARAMS)
    (tmp_path / "other" / PARAMS).rename(damaged / PARAMS)
    with pytest.raises(CheckpointError, match="cannot be read: .*params/"):
        load(damaged)
    with pytest.raises(MismatchError, match="files that differ from what was written: [0-9]+;"):
        verify_checkpoint(damaged)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_files_of_the_structure_that_are_gone(damaged: Path, name: str) -> None:
    (damaged / PARAMS / name).unlink()
    with pytest.raises(CheckpointError, match=f"cannot be read.*params/{name} is missing"):
        load(damaged, parts=("code2wav",))
    with pytest.raises(
        MismatchError, match=f"files that differ from what was written: 1;.*\n    params/{name} is missing"
    ):
        verify_checkpoint(damaged)


def test_a_data_file_of_zeros(damaged: Path) -> None:
    largest = max((damaged / PARAMS).rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    with pytest.raises(MismatchError):
        verify_checkpoint(damaged)


def test_a_changed_manifest(damaged: Path) -> None:
    text = (damaged / MANIFEST).read_text()
    (damaged / MANIFEST).write_text(text.replace('"float32"', '"float16"', 1))
    for act in (load, verify_checkpoint, identity):
        with pytest.raises(CheckpointError, match=r"manifest.json: differs from what was written.*copy it again"):
            act(damaged)
    (damaged / MANIFEST).write_text(" ".join(text.split("\n")))  # As other programs write the same values.
    assert verify_checkpoint(damaged) == 485


def test_files_that_were_not_there(damaged: Path) -> None:
    (damaged / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(CheckpointError, match="chat_template.json: was not there when .*; move it away"):
        load(damaged)
    with pytest.raises(MismatchError, match="\n    chat_template.json was not written with it"):
        verify_checkpoint(damaged)
    (damaged / "chat_template.json").unlink()
    for name in ("._config.json", ".DS_Store", "README.md"):
        (damaged / name).write_text("of a Mac")
    assert verify_checkpoint(damaged) == 485
    (damaged / PARAMS / "more").write_text("")
    with pytest.raises(MismatchError, match="\n    params/more was not written with it"):
        verify_checkpoint(damaged)


def test_additions_that_change_nothing(damaged: Path, ours: Path, tmp_path: Path) -> None:
    """Notes, licences and results beside a checkpoint; what file managers leave within it."""
    for name in ("LICENSE.txt", "notes.txt", "eval.json", "chat_notes.jinja", "Thumbs.db", f"{PARAMS}/Thumbs.db"):
        (damaged / name).write_text("mine")
    (damaged / "eval" / "more").mkdir(parents=True)
    (damaged / "eval" / "more" / "run.json").write_text("{}")
    assert load(damaged, parts=("code2wav",)).params.keys() == {"code2wav"}
    assert verify_checkpoint(damaged) == 485 and identity(damaged) == identity(ours)
    reverse_checkpoint(damaged, tmp_path / "back")
    assert not (tmp_path / "back" / "notes.txt").exists() and (tmp_path / "back" / "tokenizer.json").exists()


def test_the_names_that_loading_looks_for() -> None:
    files = (vocabulary.SAVED, vocabulary.TOKENS, vocabulary.MERGES, vocabulary.SETTINGS, vocabulary.ADDED)
    files += (template.JINJA, template.TEMPLATE, template.SETTINGS, settings.FILE, settings.SAVED)
    assert {*files, "config.json", "special_tokens_map.json"} == {*LOADED}


def test_arrays_on_another_disk(damaged: Path, tmp_path: Path) -> None:
    (damaged / PARAMS).rename(tmp_path / "disk")
    (damaged / PARAMS).symlink_to(tmp_path / "disk")
    assert verify_checkpoint(damaged) == 485
    assert record_files(damaged) == read_manifest(damaged).files
    (damaged / PARAMS / "more").write_text("")
    with pytest.raises(MismatchError, match="\n    params/more was not written with it"):
        verify_checkpoint(damaged)


def test_identity(ours: Path, damaged: Path, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Equal for two conversions, whose files have other names, and for the first format; not for another model."""
    again = tmp_path / "again"
    convert_checkpoint(checkpoints("small"), again)
    assert {*read_manifest(again).files} != {*read_manifest(ours).files}
    assert identity(again) == identity(ours) == identity(as_first_format(damaged))
    edit_manifest(again, lambda values: values["leaves"]["talker/embed"]["sha256"].update(x="0"))
    assert identity(again) != identity(ours)
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(damaged) != identity(ours)


def test_identity_reads_no_arrays(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], contents._hash
    monkeypatch.setattr(contents, "_hash", lambda path, *more: read.append(path.name) or real(path, *more))
    (damaged / "notes.txt").write_text("mine")
    before = identity(damaged)
    assert not read and identity(as_first_format(damaged)) == before
    assert "config.json" in read and {*read} <= {*LOADED}


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that may not be read."""
    names: set[str] = set()
    opened = (io.open, os.open)

    def guarded(call: Callable) -> Callable:
        def guard(path: Any, *more: Any, **named: Any) -> Any:
            if not isinstance(path, int) and os.path.basename(path) in names:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *more, **named)

        return guard

    monkeypatch.setattr(io, "open", guarded(opened[0]))
    monkeypatch.setattr(os, "open", guarded(opened[1]))
    return names


def test_files_that_may_not_be_read(
    ours: Path, checkpoints: Callable[[str], Path], tmp_path: Path, forbidden: set[str]
) -> None:
    """They are not damaged, and the destination is not at fault."""
    forbidden.add("generation_config.json")
    path = "generation_config.json: cannot be read .permission denied.; ask its owner"
    for act in (load, verify_checkpoint):
        with pytest.raises(CheckpointError, match=f"{ours}/{path}"):
            act(ours)
    for act, source in ((convert_checkpoint, checkpoints("small")), (reverse_checkpoint, ours)):
        with pytest.raises(CheckpointError, match=f"{source}/{path}"):
            act(source, tmp_path / "copy")
    assert not [*tmp_path.iterdir()]


def test_a_file_on_a_faulty_disk_differs(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = contents._hash

    def fail(path: Path, *more: Any) -> str:
        if path.name == "config.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *more)

    monkeypatch.setattr(contents, "_hash", fail)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read \(input/output error\); restore the file"):
        load(damaged)
    with pytest.raises(MismatchError, match=r"\n    config.json cannot be read \(input/output error\)"):
        verify_checkpoint(damaged)


def test_folders_that_may_not_be_read(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def guard(path: Any) -> Any:
        if os.path.basename(path) == PARAMS:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guard)
    for act in (load, verify_checkpoint):
        with pytest.raises(CheckpointError, match="params: cannot be read .permission denied"):
            act(damaged)


def test_paths_of_every_kind(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(ours.parent))
    assert verify_checkpoint("~/small") == 485 == reverse_checkpoint("~/small", tmp_path / "back")
    assert set(checkpoint.restore("~/small", ("code2wav",))) == {"code2wav"}
    nothing: Any = None
    for act in (verify_checkpoint, checkpoint.restore, lambda path: reverse_checkpoint(path, tmp_path / "more")):
        with pytest.raises(InputError, match="NoneType; give a path"):
            act(nothing)


def test_recording_shows_its_progress_and_can_be_interrupted(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record_files(ours, progress=True) == read_manifest(ours).files
    assert "hash: 100%" in capsys.readouterr().err
    monkeypatch.setattr(process._process, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        record_files(ours)
