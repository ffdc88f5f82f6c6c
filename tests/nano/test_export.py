"""What the stage export writes: read by omni_jax and by transformers as it is, small enough, replaced as a whole."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax as oj
from convert import convert_checkpoint, write_drafter
from omni_jax.cli import main
from omni_jax.config import OmniConfig
from omni_jax.draft_config import DFlashConfig, Eagle3Config
from omni_jax.errors import InputError
from omni_jax.inputs.processor import Processor
from omni_jax.train.drafters.new import Sizes, new_dflash, new_eagle3
from omni_jax.weights import locate as places
from omni_jax.weights.drafters import check_drafter
from omni_jax.weights.locate import DRAFTERS, NANO
from omni_jax.weights.model import model_config
from scripts.nano import export as stage
from scripts.nano.begin import write_beginning
from scripts.nano.export import (
    DRAFTER_BYTES,
    FILE,
    MODEL_BYTES,
    export_nano,
    shipped_drafters,
    trained_drafters,
    trained_model,
)
from scripts.nano.senses import wordings
from tests.helpers.processing import patches_at

MESSAGES = [{"role": "user", "content": "Hello"}]
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (8, 64, 96, 3), np.uint8)
PICTURE = RNG.integers(0, 256, (96, 96, 3), np.uint8)
MEDIA = [
    {"role": "user", "content": [{"type": "video", "video": CLIP, "fps": 4}, {"type": "image", "image": PICTURE}]},
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of stages with an untrained model and drafters."""
    directory = tmp_path_factory.mktemp("output")
    convert_checkpoint(write_beginning(directory / "begin", wordings(), 0), directory / "talker" / "model")
    config = model_config(directory / "begin")
    offsets, head = np.arange(8), np.zeros((config.thinker.text.vocab_size, config.thinker.text.hidden_size))
    made = {
        "dflash": new_dflash(config, _mask(directory / "begin", config), 1, 2, 16, Sizes(mlp=256), 0),
        "eagle3": new_eagle3(config, offsets, head, Sizes(mlp=256), 0),
    }
    for kind, drafter in made.items():
        write_drafter(drafter, directory / "drafters" / kind / "model")
    return directory


def _mask(directory: Path, config: OmniConfig) -> int:
    return Processor.from_dir(directory, config).tokenizer.token_id("<|fim_pad|>")


@pytest.fixture(scope="module")
def exported(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("package") / "nano"
    sizes = export_nano(trained_model(output), trained_drafters(output), package)
    assert sizes.keys() == {"model", *DRAFTERS} and sizes["model"] <= MODEL_BYTES
    assert os.listdir(package.parent) == ["nano"]
    return package


@pytest.fixture
def named(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exported model is the one that the package holds."""
    monkeypatch.setattr(places, "NANO", exported)
    monkeypatch.chdir(tmp_path)


def dtypes(directory: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / FILE, "np") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_weights_are_the_trained_ones_rounded(output: Path, exported: Path) -> None:
    import jax
    import ml_dtypes

    assert dtypes(exported) == {"BF16"}
    config = json.loads((exported / "config.json").read_text())
    assert config["dtype"] == config["thinker_config"]["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), oj.load(output / "talker/model").params)
    jax.tree.map(np.testing.assert_array_equal, rounded, oj.load(exported, dtype="bfloat16").params)


def test_drafters_are_of_their_kinds_and_fit(exported: Path) -> None:
    for kind, config in (("dflash", DFlashConfig), ("eagle3", Eagle3Config)):
        drafter = oj.load_drafter(exported / kind)
        assert drafter.kind == kind and isinstance(drafter.config, config) and drafter.values["dtype"] == "bfloat16"
        assert dtypes(exported / kind) - {"I64", "BOOL"} == {"BF16"}
        check_drafter(drafter, model_config(exported))


def test_it_answers_by_its_name(named: None, exported: Path, capsys: pytest.CaptureFixture) -> None:
    expected = oj.load(exported, parts=("thinker",)).generate(MESSAGES, max_new_tokens=4).token_ids
    asked = ["generate", "--model", "nano", "--text", "Hello", "--max-new-tokens", "4", "--json"]
    for drafter in ((), ("--drafter", "nano/dflash"), ("--drafter", "nano/eagle3")):
        main([*asked, *drafter])
        assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    main(["inspect", "--model", "nano", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["stored_dtype"] == "bfloat16" and len(report["parts"]) == 3


def test_transformers_gives_the_same_logits(exported: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3OmniMoeForConditionalGeneration

    loaded: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    theirs, told = loaded
    assert theirs.dtype == torch.bfloat16 and not any(told.values()), told
    omni = oj.load(exported, dtype="float32")
    batch = omni.prepare(MESSAGES)
    with torch.no_grad():
        logits = theirs.float().thinker(input_ids=torch.tensor(batch.token_ids).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(omni.logits(batch)), logits, atol=1e-4)


def test_transformers_gives_the_same_pictures_and_frames(exported: Path) -> None:
    """Through its own processor as it is loaded, which needs torchvision."""
    pytest.importorskip("torchvision")
    from transformers import Qwen3OmniMoeProcessor

    processor = Processor.from_dir(exported, model_config(exported))
    batch = processor.prepare(MEDIA)
    theirs: Any = Qwen3OmniMoeProcessor.from_pretrained(exported)
    text = theirs.apply_chat_template(MEDIA, add_generation_prompt=True, tokenize=False)
    out = theirs(text=text, videos=[CLIP], images=[PICTURE], fps=4, return_tensors="np")
    assert [item.grid for item in batch.items[0]] == [(4, 6, 8), (1, 8, 8)]
    np.testing.assert_array_equal(batch.token_ids, out["input_ids"])
    patches = np.concatenate([out["pixel_values_videos"], out["pixel_values"]])
    np.testing.assert_allclose(patches_at(batch, 0, 2), patches, atol=1e-6)


def test_pictures_and_frames_are_small_without_options(exported: Path) -> None:
    items = Processor.from_dir(exported, model_config(exported)).prepare(MEDIA).items[0]
    assert [item.grid for item in items] == [(4, 6, 8), (1, 8, 8)]


def test_what_was_not_trained_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="talker/model is missing; run the stage talker first"):
        trained_model(tmp_path)
    assert trained_drafters(tmp_path) == {}


def test_a_package_is_replaced_as_a_whole(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, source = tmp_path / "nano", trained_model(output)
    export_nano(source, trained_drafters(output), package)
    held = {kind: (package / kind / FILE).read_bytes() for kind in DRAFTERS}
    export_nano(source, shipped_drafters(package), package)
    assert held == {kind: (package / kind / FILE).read_bytes() for kind in DRAFTERS}
    export_nano(source, {}, package)
    assert os.listdir(tmp_path) == ["nano"] and not (package / "dflash").exists() and not shipped_drafters(package)
    before = (package / FILE).stat().st_ino
    (package / "notes.md").write_text("mine")
    with pytest.raises(InputError, match=r"also holds notes.md, which would be lost"):
        export_nano(source, {}, package)
    (package / "notes.md").unlink()
    monkeypatch.setattr(stage, "MODEL_BYTES", 9_000_000)
    with pytest.raises(InputError, match=r"model has 9,\d{3},\d{3} bytes of weights, more than 9,000,000"):
        export_nano(source, {}, package)
    assert os.listdir(tmp_path) == ["nano"] and (package / FILE).stat().st_ino == before
    package.rename(tmp_path / ".nano.old")
    with pytest.raises(InputError, match="bytes of weights"):
        export_nano(source, {}, package)
    assert os.listdir(tmp_path) == ["nano"] and (package / FILE).stat().st_ino == before


def test_the_shipped_files_are_small_and_complete() -> None:
    assert stage.weight_bytes(NANO) <= MODEL_BYTES and dtypes(NANO) == {"BF16"}
    for kind in DRAFTERS:
        assert stage.weight_bytes(NANO / kind) <= DRAFTER_BYTES
        check_drafter(oj.load_drafter(f"nano/{kind}"), model_config("nano"))


def test_the_shipped_model_answers() -> None:
    question = [{"role": "user", "content": "What is two plus three?"}]
    omni = oj.load("nano", parts=("thinker",))
    reply = omni.generate(question, max_new_tokens=32)
    assert "five" in reply.text.lower()
    for kind in DRAFTERS:
        drafter = oj.load_drafter(f"nano/{kind}")
        assert omni.generate(question, max_new_tokens=32, drafter=drafter).token_ids == reply.token_ids
