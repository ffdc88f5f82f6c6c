"""What was converted decides what can be loaded, spoken and listed; checks come before any array is read."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import convert_checkpoint, load_hf
from omni_jax import sharding
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.inspection import Inspect, inspect
from omni_jax.loading import load, load_lazily
from omni_jax.omni import Omni
from omni_jax.weights import checkpoint
from omni_jax.weights.parts import declare_parts

MESSAGES = [{"role": "user", "content": "Hi."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def part_of(checkpoints: Callable[[str], Path], folder: Path) -> Callable[..., Path]:
    """`part_of("thinker")` is the "small" checkpoint converted with these parts only."""

    def convert(*parts: str) -> Path:
        if not (folder / "-".join(parts)).exists():
            convert_checkpoint(checkpoints("small"), folder / "-".join(parts), parts=parts)
        return folder / "-".join(parts)

    return convert


def test_a_thinker_alone_loads_answers_and_says_why_it_cannot_speak(part_of: Callable[..., Path]) -> None:
    ours = part_of("thinker")
    config, omni = checkpoint.read_config(ours), load(ours)
    assert config.talker is None and config.code2wav is None and omni.params.keys() == {"thinker"}
    assert omni.generate(MESSAGES, max_new_tokens=2).token_ids
    with pytest.raises(InputError, match="holds no talker and code2wav; convert the whole model, with all its parts"):
        omni.generate(MESSAGES, speech=True)
    with pytest.raises(InputError, match=r"holds \['thinker'\]; choose from these, or take .* whole model"):
        load(ours, parts=("thinker", "talker"))


@pytest.mark.parametrize("parts", [("thinker",), ("thinker", "talker")], ids=" ".join)
def test_the_command_line_says_the_same_before_it_loads(
    part_of: Callable[..., Path], parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", str(part_of(*parts)), "--text", "Hi", "--speak", str(tmp_path / "a.wav")])
    said = capsys.readouterr().err
    assert caught.value.code == 3 and "holds no" in said and "convert the whole model" in said and "loading" not in said


@pytest.mark.parametrize("parts", [("thinker",), ("thinker", "talker"), ("code2wav",)], ids=" ".join)
def test_inspect_lists_what_is_there(
    part_of: Callable[..., Path], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(Inspect(part_of(*parts), json=True))
    report = json.loads(capsys.readouterr().out)
    assert tuple(report["parts"]) == parts and report["speakers"] == [] and not report["speech"]
    assert (report["thinker_bytes"] is None) == ("thinker" not in parts)
    inspect(Inspect(part_of(*parts), mesh="data=1"))
    said = capsys.readouterr().out
    assert ("no Thinker is here" in said) == ("thinker" not in parts)
    assert [part for part in ("thinker", "talker", "code2wav") if f"of the {part}'s weights" in said] == list(parts)


def test_a_vocoder_alone_makes_sound(part_of: Callable[..., Path]) -> None:
    omni = load(part_of("code2wav"))
    assert omni.config.code2wav is not None
    assert omni.vocode(np.zeros((omni.config.code2wav.num_quantizers, 3), np.int32)).size
    with pytest.raises(InputError, match="without its thinker; load it with parts=.*, from a checkpoint that holds"):
        omni.generate(MESSAGES)


@pytest.mark.parametrize("stored, held", [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "float32")])
def test_accelerators_hold_weights_as_stored_unless_that_is_float16(
    stored: str,
    held: str,
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ours", parts=("code2wav",), dtype=stored)
    assert load_lazily(tmp_path / "ours").params["code2wav"]["embed"].dtype == "float32", "on CPU"
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert {x.dtype for x in jax.tree.leaves(load(tmp_path / "ours").params)} == {np.dtype(held)}
    inspect(Inspect(tmp_path / "ours", json=True))
    report = json.loads(capsys.readouterr().out)
    assert (report["stored_dtype"], report["dtype"]) == (stored, held)


def test_weights_are_read_once_whoever_asks(checkpoints: Callable[[str], Path]) -> None:
    read: list[Omni] = []

    def slowly(omni: Omni) -> None:
        read.append(omni)
        time.sleep(0.3)

    omni = load_lazily(checkpoints("tiny"), parts=("code2wav",), before_reading=slowly)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: omni.code2wav, range(2))
    assert len(read) == 1 and isinstance(one.embed[...], jax.Array) and isinstance(other.embed[...], jax.Array)


@pytest.mark.parametrize("form", ["converted", "published"])
def test_weights_are_found_after_a_change_of_directory(
    form: str, part_of: Callable[..., Path], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = part_of("code2wav") if form == "converted" else checkpoints("tiny")
    monkeypatch.chdir(directory.parent)
    omni = load_lazily(directory.name, parts=("code2wav",))
    monkeypatch.chdir("/")
    assert isinstance(omni.code2wav.embed[...], jax.Array)


def test_a_part_is_declared_once(checkpoints: Callable[[str], Path]) -> None:
    omni = load_lazily(checkpoints("tiny"), parts=("code2wav",))
    (declared,) = declare_parts(omni.config, ("code2wav",)).values()
    assert omni.declarations["code2wav"].graphdef is declared.graphdef


def test_a_model_that_never_spoke_says_so_too(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints("small"), tmp_path / "source"))
    values = json.loads((source / "config.json").read_text()) | {"enable_audio_output": False}
    (source / "config.json").write_text(json.dumps(values))
    from tests.convert.conftest import edit_tensors

    def silence(tensors: dict) -> None:
        for name in [name for name in tensors if not name.startswith("thinker.")]:
            del tensors[name]

    for shard in (0, 1):
        edit_tensors(source, silence, shard)
    convert_checkpoint(source, tmp_path / "ours")
    with pytest.raises(InputError, match="holds no talker and code2wav; convert the whole model"):
        load(tmp_path / "ours").generate(MESSAGES, speech=True)
    for act in (load, load_hf, lambda source, parts: convert_checkpoint(source, tmp_path / "more", parts)):
        with pytest.raises(InputError, match=r"parts \('talker',\): .*source holds \['thinker'\]; choose from these"):
            act(source, parts=("talker",))
    with pytest.raises(InputError, match=r"parts \('talker',\): .*ours holds \['thinker'\]; choose from these"):
        checkpoint.restore(tmp_path / "ours", ("talker",))
