"""Drafters from their directories: what is read, what is refused, which hidden states of the Thinker they mean."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import omni_jax
from convert import load_hf
from omni_jax.config import OmniConfig
from omni_jax.decode.draft.plan import proposer_for
from omni_jax.draft_config import DFlashConfig, read_draft_config
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.models.param import bind, declare
from omni_jax.models.thinker import Thinker
from omni_jax.weights.draft_keymap import table
from omni_jax.weights.drafters import Drafter, check_drafter, declare_drafter, load_drafter
from omni_jax.weights.safetensors import INDEX
from omni_jax.weights.trees import flatten
from scripts.small.configs import PUBLIC_DFLASH, config_dict
from scripts.small.drafter import make_drafter
from tests.helpers.keymap import check_table

VARIANTS = ("tiny", "small", "odd")
KINDS = ("dflash", "eagle3")
WEIGHTS = "model.safetensors"
Edit = Callable[[dict[str, np.ndarray]], Any]


@pytest.fixture
def copy(drafters: Callable[[str, str], Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """`copy("dflash", "tiny")` is a drafter to damage."""
    return lambda kind, variant: Path(shutil.copytree(drafters(kind, variant), tmp_path / f"{kind}-{variant}"))


def target(variant: str) -> OmniConfig:
    return OmniConfig.from_hf(config_dict(variant))


def edit_config(directory: Path, edit: Callable[[dict], Any]) -> None:
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))


def edit_tensors(directory: Path, edit: Edit) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafters_load_and_fit(kind: str, variant: str, drafters: Callable[[str, str], Path]) -> None:
    drafter = omni_jax.load_drafter(drafters(kind, variant))
    assert drafter.kind == kind
    check_drafter(drafter, target(variant))
    assert jax.tree.map(lambda x: x.shape, drafter.params) == jax.tree.map(
        lambda x: x.shape, drafter.declaration.shapes
    )
    half = load_drafter(drafters(kind, variant), dtype="bfloat16")
    numbers = [x.dtype for x in jax.tree.leaves(half.params)]
    assert numbers.count(jnp.bfloat16) == len(numbers) - (kind == "eagle3")


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    drafter = load_drafter(make_drafter(tmp_path, "small", "dflash", dtype="bfloat16"))
    exact = load_drafter(make_drafter(tmp_path, "small", "dflash"))
    for half, full in zip(jax.tree.leaves(drafter.params), jax.tree.leaves(exact.params), strict=True):
        assert half.dtype == jnp.bfloat16
        np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


def test_the_public_draft_has_its_tensors() -> None:
    config = read_draft_config(PUBLIC_DFLASH)
    kind, declaration = declare_drafter(config)
    rows = table(config, declaration)
    check_table(rows)
    stored = [(name, source.shape) for row in rows for i in row.indices() for name, source in row.placements(i)]
    assert kind == "dflash" and len(stored) == 58 == len({name for name, _ in stored})
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(declaration.shapes)]
    assert sum(sizes) == sum(np.prod(shape) for _, shape in stored) == 335_570_176


def test_a_kind_without_a_case_is_no_other_kind() -> None:
    """Nothing falls through to EAGLE-3."""
    config, declaration = cast(Any, object()), declare_drafter(read_draft_config(PUBLIC_DFLASH))[1]
    drafter = Mock(config=config, declaration=declaration)
    for use in (
        lambda: declare_drafter(config),
        lambda: table(config, declaration),
        lambda: check_drafter(drafter, Mock()),
        lambda: proposer_for(drafter, 4),
    ):
        with pytest.raises(AssertionError, match="object object"):
            use()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_declared_array_has_a_row(kind: str, variant: str, drafters: Callable[[str, str], Path]) -> None:
    drafter = load_drafter(drafters(kind, variant))
    rows = table(drafter.config, drafter.declaration)
    check_table(rows)
    assert {row.path for row in rows} == flatten(drafter.declaration.shapes).keys() - {"d2t"}


@pytest.mark.parametrize(
    "kind, variant", [("dflash", "small"), ("dflash", "odd"), ("eagle3", "tiny"), ("eagle3", "odd")]
)
def test_taps_are_the_references_hidden_states(
    kind: str,
    variant: str,
    drafters: Callable[[str, str], Path],
    checkpoints: Callable[[str], Path],
    reference: Callable[[str], Any],
) -> None:
    """DFlash layer j is `hidden_states[j + 1]`; EAGLE-3 reads what enters layers 2, L // 2 and L - 3."""
    import torch

    drafter = load_drafter(drafters(kind, variant))
    params, config = load_hf(checkpoints(variant), parts=("thinker",))
    thinker: Thinker = bind(declare(Thinker, config.thinker), params["thinker"])
    ids, L = np.arange(7, 20)[None], config.thinker.text.num_layers
    taps = drafter.taps(L)
    position = jnp.broadcast_to(jnp.arange(13.0), (3, 1, 13))
    tapped = thinker.forward(thinker.embed_tokens(jnp.asarray(ids)), position, taps=taps).taps
    with torch.no_grad():
        states = reference(variant).thinker(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states
    if isinstance(drafter.config, DFlashConfig):
        want = [states[j + 1] for j in drafter.config.target_layer_ids]
    elif variant == "odd":
        want = [states[2], states[L // 2], states[L - 3]]
    else:
        want = [states[j + 1] for j in (1, 2, 3)]
    for got, state in zip(tapped, want, strict=True):
        np.testing.assert_allclose(got, state, rtol=0, atol=1e-4 * float(state.abs().max()))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"hidden_size": 64}, "width is 256.*64"),
        ({"vocab_size": 999}, "vocabulary is 512.*999"),
        ({"num_layers": 6}, "model of 4 layers, this one has 6"),
    ],
)
def test_another_target_is_refused(changes: dict, match: str, drafters: Callable[[str, str], Path]) -> None:
    config = target("tiny")
    text = dataclasses.replace(config.thinker.text, **changes)
    config = dataclasses.replace(config, thinker=dataclasses.replace(config.thinker, text=text))
    with pytest.raises(InputError, match=match):
        check_drafter(load_drafter(drafters("dflash", "tiny")), config)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_beyond_the_target_are_refused(kind: str, drafters: Callable[[str, str], Path]) -> None:
    drafter = load_drafter(drafters(kind, "tiny"))
    last, beyond = ((3,), (0, 4)) if kind == "dflash" else ((2, 3, 4), (2, 3, 5))
    field = "target_layer_ids" if kind == "dflash" else "hidden_states"
    check_drafter(_changed(drafter, **{field: last}), target("tiny"))
    with pytest.raises(InputError, match="hidden states .*5.*this model has 4"):
        check_drafter(_changed(drafter, **{field: beyond}), target("tiny"))


def test_a_target_too_shallow_for_the_usual_three_is_refused(drafters: Callable[[str, str], Path]) -> None:
    drafter = _changed(load_drafter(drafters("eagle3", "tiny")), hidden_states=None)
    with pytest.raises(InputError, match=re.escape("[2, 2, 1]")):
        check_drafter(drafter, target("tiny"))


@pytest.mark.parametrize(
    "name, offset",
    [
        *((n, 0) for n in ("image", "video", "audio", "vision_start", "audio_start")),
        ("vision_start", 1),
        ("audio_start", 1),
    ],
)
def test_a_mask_that_is_a_media_token_is_refused(name: str, offset: int, drafters: Callable[[str, str], Path]) -> None:
    config = target("tiny")
    mask = getattr(config.thinker, f"{name}_token_id") + offset
    drafter = _changed(load_drafter(drafters("dflash", "tiny")), mask_token_id=mask)
    with pytest.raises(InputError, match=f"mask_token_id {mask} is this model's {name.split('_')[0]}"):
        check_drafter(drafter, config)


@pytest.mark.parametrize("mask", [-1, 512])
def test_a_mask_outside_the_vocabulary_is_refused(mask: int, drafters: Callable[[str, str], Path]) -> None:
    with pytest.raises(InputError, match=f"mask_token_id {mask} is outside"):
        check_drafter(_changed(load_drafter(drafters("dflash", "tiny")), mask_token_id=mask), target("tiny"))


def test_the_mask_of_text_models_collides_with_the_public_checkpoint(data_dir: Path) -> None:
    """151669 is free in Qwen3 and starts audio in Qwen3-Omni; 151662 is free in both."""
    config = OmniConfig.from_hf(json.loads((data_dir / "public_config.json").read_text()))
    draft = read_draft_config(PUBLIC_DFLASH)
    drafter = Drafter("dflash", draft, declare_drafter(draft)[1], {}, PUBLIC_DFLASH, {})
    check_drafter(drafter, config)
    with pytest.raises(InputError, match="151669 is this model's audio_start"):
        check_drafter(_changed(drafter, mask_token_id=151669), config)


def _changed(drafter: Drafter, **changes: Any) -> Drafter:
    return dataclasses.replace(drafter, config=dataclasses.replace(drafter.config, **changes))


def _rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    "kind, edit, match",
    [
        ("dflash", lambda t: t.pop("fc.weight"), "1 tensors are missing:\n    fc.weight$"),
        (
            "dflash",
            lambda t: t.update({"layers.2.mlp.x": t["norm.weight"]}),
            "no place in the model; perhaps .* not implemented:\n    layers.2.mlp.x",
        ),
        (
            "dflash",
            lambda t: t.update({"lm_head.weight": t["norm.weight"]}),
            "no place in the model; perhaps .*:\n    lm_head",
        ),
        ("dflash", lambda t: t.update({"d2t": np.zeros(3, np.int64)}), "no place in the model; perhaps .*:\n    d2t"),
        ("dflash", lambda t: t.update({"model.norm.weight": t["norm.weight"]}), "two names of one tensor"),
        ("dflash", lambda t: t.update({"norm.weight": t["norm.weight"][:-1]}), r"norm.weight \[255\].*\[256\]"),
        (
            "dflash",
            lambda t: t.update({"norm.weight": t["norm.weight"].astype(np.int8)}),
            "unsupported dtype.*:\n    norm.weight I8",
        ),
        (
            "dflash",
            lambda t: t.update({"norm.weight": t["norm.weight"] * np.nan}),
            "'norm.weight' holds 256 NaN or infinite values",
        ),
        (
            "dflash",
            lambda t: t.update({(n := "layers.1.self_attn.k_proj.weight"): t[n].astype(np.float16)}),
            "layers/qkv would mix dtypes",
        ),
        ("eagle3", lambda t: t.pop("d2t"), "'d2t' is missing"),
        ("eagle3", lambda t: t.update({"d2t": t["d2t"][:-1]}), "'d2t' is I64 .299"),
        ("eagle3", lambda t: t.update({"d2t": t["d2t"] + 300}), "'d2t' does not lead"),
        ("eagle3", lambda t: t.update({"d2t": -np.arange(300)}), "'d2t' does not lead"),
        ("eagle3", lambda t: t.update({"t2d": ~t["t2d"]}), "name different tokens"),
        ("eagle3", _rename("midlayer.hidden_norm.weight", "hidden_norm.weight"), "midlayer.hidden_norm.weight"),
    ],
)
def test_wrong_tensors_are_named(kind: str, edit: Edit, match: str, copy: Callable[[str, str], Path]) -> None:
    directory = copy(kind, "tiny")
    edit_tensors(directory, edit)
    with pytest.raises(CheckpointError, match=match):
        load_drafter(directory)


def test_t2d_is_not_needed(copy: Callable[[str, str], Path]) -> None:
    directory = copy("eagle3", "tiny")
    edit_tensors(directory, lambda tensors: tensors.pop("t2d"))
    assert load_drafter(directory).params["d2t"].any()


def _truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    "damage, match",
    [
        (_truncate, "truncated, 4 bytes are missing; download it again"),
        (lambda d: (d / WEIGHTS).write_bytes(b"version https://git-lfs"), "a Git LFS pointer"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), "not a safetensors file, or truncated"),
        (lambda d: (d / WEIGHTS).unlink(), "nor a .safetensors file is here; download"),
        (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "only pickle files"),
        (lambda d: shutil.copy(d / WEIGHTS, d / "other.safetensors"), "2 safetensors files but no"),
    ],
)
def test_damaged_files_are_named(damage: Callable, match: str, copy: Callable[[str, str], Path]) -> None:
    directory = copy("dflash", "tiny")
    damage(directory)
    with pytest.raises(CheckpointError, match=match):
        load_drafter(directory)


@pytest.mark.parametrize(
    "edit, match",
    [
        (lambda m: m.update({"model.fc.weight": "gone.safetensors"}), "gone.safetensors is missing"),
        (lambda m: m.update({"more.weight": m["model.fc.weight"]}), "promises tensor 'more.weight'"),
        (lambda m: m.update({"model.fc.weight": "../x.safetensors"}), "only files of the directory itself"),
    ],
)
def test_wrong_indices_are_named(edit: Callable, match: str, copy: Callable[[str, str], Path]) -> None:
    directory = copy("dflash", "small")
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=match):
        load_drafter(directory)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_configs_in_other_encodings(encoding: str, copy: Callable[[str, str], Path]) -> None:
    directory = copy("dflash", "small")
    expected = load_drafter(directory).config
    for name in ("config.json", INDEX):
        (directory / name).write_bytes((directory / name).read_text().encode(encoding))
    assert load_drafter(directory).config == expected


def test_a_path_from_home(copy: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = copy("dflash", "tiny")
    monkeypatch.setenv("HOME", str(directory.parent))
    assert load_drafter(f"~/{directory.name}").kind == "dflash"


def test_wrong_configs_are_named(copy: Callable[[str, str], Path]) -> None:
    directory = copy("dflash", "tiny")
    edit_config(directory, lambda values: values.update(block_size=1))
    with pytest.raises(ConfigError, match="block_size"):
        load_drafter(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        load_drafter(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json is missing; take it from the checkpoint itself"):
        load_drafter(directory)
    with pytest.raises(InputError, match="int4"):
        load_drafter(directory, dtype="int4")
