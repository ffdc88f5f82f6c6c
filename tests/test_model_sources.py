"""Every form in which a model or a drafter may be named gives the same one, and what is incomplete is named."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax as oj
from convert import convert_checkpoint, load_hf
from convert.__main__ import main as convert
from omni_jax.cli import main
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.sharding import make_mesh
from omni_jax.weights.manifest import identity
from omni_jax.weights.safetensors import INDEX

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
SHARD = "model-00002-of-00002.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "some-one/tiny.model"


def make_cache(home: Path, directory: Path, model_id: str = ID) -> Path:
    """A hub cache below `home` as huggingface_hub leaves it, with a model's files as links to blobs; its snapshot."""
    folder = home / "hub" / f"models--{model_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for path in filter(Path.is_file, directory.rglob("*")):
        blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def offline(home: Path) -> dict[str, str]:
    """The environment of a process that has this cache and no hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    return kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of an empty hub cache, without a hub, for this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def ours(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources") / "ours"
    convert_checkpoint(checkpoints("tiny"), directory)
    return directory


def same_params(one: dict, other: dict) -> None:
    def same(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(same, one, other)


def test_every_source_gives_the_same_model(
    checkpoints: Callable[[str], Path], omnis: Callable[[str], Any], ours: Path, home: Path
) -> None:
    snapshot, saved = make_cache(home, checkpoints("tiny")), omnis("tiny")
    reply = saved.generate(MESSAGES, max_new_tokens=4)
    bare, config = load_hf(snapshot)
    same_params(saved.params, bare)
    assert config == saved.config
    make_cache(home, ours, "some-one/converted")
    for where in (ours, snapshot, ID, "some-one/converted"):
        omni = oj.load(where)
        same_params(saved.params, omni.params)
        assert omni.config == saved.config
        assert omni.generate(MESSAGES, max_new_tokens=4).token_ids == reply.token_ids


def test_every_source_takes_the_same_keywords(checkpoints: Callable[[str], Path], ours: Path, home: Path) -> None:
    make_cache(home, checkpoints("tiny"))
    options: dict[str, Any] = {"mesh": "expert=2,tensor=2,data=2", "dtype": "bfloat16", "parts": ("thinker",)}
    converted = oj.load(ours, **options)
    assert {x.dtype.name for x in jax.tree.leaves(converted.params)} == {"bfloat16"}
    for where in (checkpoints("tiny"), ID):
        same_params(converted.params, oj.load(where, **options).params)
        with pytest.raises(InputError, match="expert=3 does not divide the thinker's num_experts 16"):
            oj.load(where, mesh=make_mesh(jax.devices()[:3], expert=3))
        with pytest.raises(InputError, match=r"parts \('ears',\): choose from these"):
            oj.load(where, parts=("ears",))


LOAD = f"""
import json, omni_jax as oj
omni = oj.load("{ID}", parts=("thinker",))
print(json.dumps(omni.generate({MESSAGES!r}, max_new_tokens=4).token_ids))
"""


def test_a_model_id_is_found_in_the_cache_without_a_hub(
    checkpoints: Callable[[str], Path], omnis: Callable[[str], Any], tmp_path: Path
) -> None:
    make_cache(tmp_path, checkpoints("tiny"))
    run = {"env": offline(tmp_path), "cwd": Path(__file__).parent.parent, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", LOAD], **run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == omnis("tiny").generate(MESSAGES, max_new_tokens=4).token_ids
    done = subprocess.run([sys.executable, "-c", LOAD.replace(ID, "some-one/else")], **run)
    assert (
        "CheckpointError: some-one/else: neither a directory here nor a model in the Hugging Face cache" in done.stderr
    )
    assert str(tmp_path / "hub") in done.stderr and "unset HF_HUB_OFFLINE" in done.stderr


def test_the_commands_take_a_model_id(
    checkpoints: Callable[[str], Path], drafters: Callable, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_cache(home, checkpoints("tiny"))
    make_cache(home, drafters("dflash", "tiny"), "some-one/draft")
    main(["inspect", "--model", ID, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "Hugging Face checkpoint" and tuple(report["parts"]) == ("thinker", "talker", "code2wav")
    assert convert(["--dry-run", ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == report["parameters"]
    assert convert([ID, str(tmp_path / "ours"), "--parts", "thinker", "--json"]) == 0
    capsys.readouterr()
    said = []
    for model, drafter in ((str(tmp_path / "ours"), ()), (ID, ("--drafter", "some-one/draft"))):
        main(["generate", "--model", model, "--text", "Why?", "--max-new-tokens", "4", "--json", *drafter])
        said.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_drafters_come_from_the_same_sources(kind: str, drafters: Callable[[str, str], Path], home: Path) -> None:
    snapshot, loaded = make_cache(home, drafters(kind, "tiny")), oj.load_drafter(drafters(kind, "tiny"))
    for where in (snapshot, ID):
        drafter = oj.load_drafter(where)
        same_params(loaded.params, drafter.params)
        assert (drafter.config, drafter.stored) == (loaded.config, loaded.stored)
    with pytest.raises(CheckpointError, match="some-one/else: neither a directory here nor a model in the"):
        oj.load_drafter("some-one/else")


def _lose_blob(snapshot: Path, name: str) -> Path:
    blob = (snapshot / name).resolve()
    blob.unlink()
    return blob


def _never_completed(snapshot: Path) -> None:
    blob = _lose_blob(snapshot, SHARD)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"\0" * 100)


def _truncate(snapshot: Path) -> None:
    blob = (snapshot / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-7])


def _only_first_shard(snapshot: Path) -> None:
    for name in (SHARD, INDEX):
        (snapshot / name).unlink()


def _begun(snapshot: Path) -> None:
    (snapshot / SHARD).unlink()
    (snapshot / f"{SHARD}.incomplete").write_bytes(b"")


def _full_size(snapshot: Path) -> None:
    """As aria2 leaves it: the file has its size, and what is missing of it is in a file beside it."""
    (snapshot / f"{SHARD}.aria2").write_bytes(b"")


def _template_begun(snapshot: Path) -> None:
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja.incomplete").write_bytes(b"")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda s: (s / SHARD).unlink(), f"{SHARD} is missing; download the checkpoint completely"),
        (lambda s: _lose_blob(s, SHARD), f"{SHARD}: a link to .*/blobs/[0-9a-f]+, which is missing; download"),
        (_never_completed, f"{SHARD}: a link to .*/blobs/[0-9a-f]+, which was not downloaded completely; download"),
        (_begun, rf"{SHARD}.incomplete is a download that was not completed; download {SHARD} again"),
        (_full_size, rf"{SHARD}.aria2 is a download that was not completed; .*, or remove {SHARD}.aria2 if"),
        (_template_begun, "chat_template.jinja.incomplete is a download that was not completed"),
        (_truncate, f"{SHARD}: truncated, 7 bytes are missing; download it again"),
        (_only_first_shard, f"1 safetensors files but no {INDEX}, and 2 shards belong together"),
        (lambda s: (s / INDEX).unlink(), f"2 safetensors files but no {INDEX}"),
        (lambda s: _lose_blob(s, "tokenizer.json"), "tokenizer.json: a link to .*, which is missing"),
        (lambda s: _lose_blob(s, "config.json"), "config.json: a link to .*, which is missing"),
    ],
    ids=[
        *("shard", "blob", "incomplete blob", "incomplete file", "of full size", "incomplete template"),
        *("truncated", "one shard", "index", "small", "config"),
    ],
)
def test_a_partial_download_says_which_file(
    damage: Callable[[Path], Any], words: str, checkpoints: Callable[[str], Path], home: Path
) -> None:
    damage(make_cache(home, checkpoints("small")))
    for load in (oj.load, load_hf):
        with pytest.raises(CheckpointError, match=words):
            load(ID)


def test_a_download_that_only_began(home: Path) -> None:
    snapshot = home / "model"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.incomplete").write_bytes(b"")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model.safetensors.incomplete is a download that was not completed"):
        oj.load(snapshot)


@pytest.mark.parametrize(
    "missing, what",
    [
        ([SHARD], SHARD),
        (["chat_template.jinja"], "chat_template.jinja"),
        (["LICENSE.txt", "a.txt", "b.txt", SHARD], r"LICENSE.txt, a.txt, b.txt, ... \(1 more\)"),
        (["LICENSE.txt"], None),
    ],
    ids=["weights", "template", "more than it names", "licence"],
)
def test_the_hub_names_an_incomplete_snapshot(
    missing: list[str], what: str | None, checkpoints: Callable[[str], Path], home: Path
) -> None:
    """huggingface_hub remembers the files of a model and refuses a snapshot that lacks some; we say which."""
    snapshot = make_cache(home, checkpoints("small"))
    for name in missing:
        (snapshot / name).unlink(missing_ok=True)
    listing = snapshot.parent.parent / "trees" / f"{COMMIT}.json"
    listing.parent.mkdir()
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in (*missing, "config.json")}
    listing.write_text(json.dumps({"format_version": 1, "files": files}))
    if what is None:
        assert oj.load(ID, parts=("code2wav",)).params
        return
    with pytest.raises(CheckpointError, match=f"{COMMIT}: not downloaded completely, {what} missing; download"):
        oj.load(ID)


def test_folders_of_the_hub_cache_that_are_no_model(checkpoints: Callable[[str], Path], home: Path) -> None:
    snapshot = make_cache(home, checkpoints("small"))
    for folder in (snapshot.parent, snapshot.parent.parent, snapshot.parent.parent / "blobs", home / "hub"):
        with pytest.raises(CheckpointError, match="a folder of the Hugging Face cache; name one of those in its"):
            oj.load(folder)


class Refused(OSError):
    """What huggingface_hub raises for an answer of the hub."""

    response = SimpleNamespace(status_code=404)


@pytest.mark.parametrize(
    "error, words",
    [
        (Refused("404 Client Error. (Request ID: 1)"), "the hub shows no such model; .*log in with `hf auth login`$"),
        (FileNotFoundError("Got: ConnectError: [Errno -2]"), "neither a directory here nor .*; check the network$"),
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be downloaded \(no space left on device\)$"),
        (ValueError("Proxy?"), r"cannot be downloaded \(Proxy[?]\)$"),
    ],
    ids=["refused", "no network", "full disk", "other"],
)
def test_why_a_model_cannot_be_downloaded(
    error: Exception, words: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"^{ID}: {words}"):
        oj.load(ID)


def test_only_what_a_model_needs_is_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or home
    )
    home.mkdir()
    with pytest.raises(ConfigError, match="config.json is missing"):
        oj.load(ID)
    assert asked == [(ID, ["*.safetensors", "params/*", "*.json", "*.jinja", "*.txt"])]


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/a/b", "./a/../../b", "some one/model", "-a/b", "a/.b"])
def test_what_is_no_model_id_is_a_directory_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(CheckpointError, match=": no such directory$"):
        oj.load(name)


def test_a_directory_comes_before_a_model_id(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "some-one").mkdir()
    (tmp_path / ID).symlink_to(checkpoints("tiny"))
    assert load_hf(ID, parts=("code2wav",))[0].keys() == {"code2wav"}


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"some-one/tiny.model: no such directory; .* install omni_jax\[hub\]"):
        oj.load(ID)


def test_identity_of_a_hugging_face_directory(checkpoints: Callable[[str], Path], home: Path) -> None:
    snapshot = make_cache(home, checkpoints("tiny"))
    assert identity(snapshot) == identity(checkpoints("tiny")) != identity(checkpoints("small"))
    (snapshot / "README.md").write_text("Notes.")
    assert identity(snapshot) == identity(checkpoints("tiny"))
    (snapshot / "chat_template.jinja").unlink()
    assert identity(snapshot) != identity(checkpoints("tiny"))
