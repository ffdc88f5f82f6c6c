"""Which mesh a model gets, what that weighs, and what is refused before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

import omni_jax as oj
from convert import convert_checkpoint, load_hf
from omni_jax.cli import main
from omni_jax.errors import CheckpointError, InputError
from omni_jax.omni import PARTS
from omni_jax.sharding import MESH_AXES, make_mesh, mesh_name
from omni_jax.weights import budget, checkpoint
from omni_jax.weights.mesh_text import parse_parts
from omni_jax.weights.placement import resolve_placement
from tests.helpers.placing import parts_of, with_memory


@pytest.mark.parametrize(
    "gigabytes, chosen, devices, why",
    [
        (
            None,
            "data=1",
            8,
            "data=1: the model over 1 device, the fewest that hold it by experts; 70.52 GB of weights on each (dev",
        ),
        (
            141,
            "data=8",
            8,
            "1 device, the fewest that hold it by experts, 8 times for more rows; 70.52 GB of weights on each (of",
        ),
        (80, "expert=2,data=4", 8, "over 2 devices, the fewest that hold it by experts, 4 times for more rows"),
        (40, "expert=4,data=2", 8, "over 4 devices, the fewest that hold it by experts, 2 times for more rows"),
        (40, "expert=4", 6, "over 4 devices, the fewest that hold it by experts, 2 left over"),
        (24, "expert=8", 8, "over 8 devices, the fewest that hold it by experts; 14.50 GB of weights on each"),
        (24, "expert=2,tensor=2", 4, "over 4 devices, the fewest that hold it by experts and heads; 19.35 GB of"),
    ],
)
def test_automatic_meshes_of_the_public_model(
    gigabytes: float | None, chosen: str, devices: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, gigabytes)
    placed = resolve_placement("auto", parts_of("full"), jax.devices()[:devices])
    assert placed.reason.startswith(f"{chosen}: the model over") and why in placed.reason
    assert set(placed.meshes) == set(PARTS) and mesh_name(placed.meshes["thinker"]) == chosen


def test_an_automatic_mesh_takes_as_many_experts_as_divide_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("small", "thinker")
    with_memory(monkeypatch, parts[0].bytes_on_a_device({"expert": 3}) / 0.9 / 1e9 + 1e-6)
    assert mesh_name(resolve_placement("auto", parts).meshes["thinker"]) == "expert=3,data=2", "of 6 experts"


def test_a_batch_is_planned_with_the_rows_that_its_slots_have() -> None:
    (thinker,) = parts_of("full", "thinker")
    cache = 2 * 48 * 4 * 4096 * 128 * 2
    for sizes, rows in (({"data": 8}, 1), ({"data": 16}, 1), ({"data": 6}, 2)):
        # While it doubles, and with a prompt in flight.
        held = rows * cache * 5 // 4 + cache
        assert thinker.bytes_on_a_device(sizes) - thinker.weight_bytes(sizes) == held


class OfTwoProcesses:
    """A device of the second of two processes, as far as placing looks."""

    process_index = 1
    platform = "cpu"


def test_each_process_needs_devices_of_the_mesh() -> None:
    devices = [*jax.devices()[:4], *[OfTwoProcesses()] * 4]
    parts = parts_of("tiny", "thinker")
    for asked, complaint in (
        ("expert=4", "mesh expert=4 takes 4 of 8 devices, which leaves process 1 without any; .* as expert=4,data=2"),
        ("data=2", "leaves process 1 without any; .* as data=8"),
        (make_mesh(expert=2), "leaves process 1 without any; .* as expert=2,data=4"),
        ({"thinker": make_mesh(expert=2), "talker": make_mesh(expert=4)}, "as expert=2,data=4"),
    ):
        with pytest.raises(InputError, match=complaint):
            resolve_placement(asked, parts, devices)
    assert resolve_placement(None, parts, devices).meshes == {}, "a model in each process"
    both = {"thinker": make_mesh(expert=2), "talker": make_mesh(expert=4), "code2wav": make_mesh(expert=4)}
    with pytest.raises(InputError, match="several processes share one mesh for all parts: leave out the parts' names"):
        resolve_placement(both, parts_of("tiny"), devices)


def test_memory_is_asked_of_devices_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = OfTwoProcesses(), jax.devices()[0]
    monkeypatch.setattr(budget, "memory_limit", lambda device: 1 if device is near else None)
    with pytest.raises(CheckpointError, match="each device would hold"):
        resolve_placement(None, parts_of("tiny"), [far, near])


def test_what_does_not_fit_is_said_with_the_mesh_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 24)
    for asked, held in ((None, "70.79"), ("expert=2,data=4", "38.78"), (make_mesh(expert=4), "2")):
        with pytest.raises(CheckpointError, match=rf"hold {held}.* GB .* of 21.60 GB .* fits is expert=2,tensor=2"):
            resolve_placement(asked, parts_of("full"))
    with_memory(monkeypatch, 0.5)
    for asked in ("auto", "expert=8"):
        with pytest.raises(CheckpointError, match="no mesh makes it fit; load fewer parts"):
            resolve_placement(asked, parts_of("full"))


def test_bytes_of_the_public_thinker() -> None:
    (thinker,) = parts_of("full", "thinker")
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    whole, eighth = (thinker.bytes_on_a_device(sizes) for sizes in ({}, {"expert": 8}))
    cache = 2 * 48 * 8 * 4 * 4096 * 128 * 2
    # Meanwhile a quarter more of it, and a ninth conversation, which every device holds whole.
    most = cache * 5 // 4
    assert whole - eighth == (experts + most) * 7 // 8
    assert thinker.most_cache_bytes({}, 8, 4096) == most + cache // 8
    assert thinker.most_cache_bytes({"expert": 8}, 8, 4096) == most // 8 + cache // 8
    assert [thinker.cache_bytes({"expert": 8}, rows, 4096) for rows in (1, 8, 12)] == [cache // 8] * 2 + [
        cache * 3 // 2
    ]


@pytest.mark.parametrize(
    "variant, mesh, complaint",
    [
        ("small", "expert=4", "expert=4 does not divide the thinker's num_experts 6"),
        ("small", "expert=2", "expert=2 does not divide the talker's num_experts 5"),
        ("tiny", "tensor=4", "tensor=4 does not divide the thinker's num_key_value_heads 2"),
        ("tiny", "tensor=2;", "tensor is '2;'"),
        ("tiny", "expert=3", "takes 3 devices, which does not divide the 8"),
        ("tiny", "expert=4,data=4", "takes 16 devices, there are 8"),
        ("tiny", "thinker:expert=8;talker:expert=2", "takes 10 devices, there are 8"),
        ("tiny", "thinker:expert=4", "says nothing of the talker"),
        ("tiny", "thinker:expert=4;thinker:expert=2", "gives thinker twice"),
        ("tiny", "speaker:expert=4", "no part is called 'speaker'"),
    ],
)
def test_meshes_that_are_refused(variant: str, mesh: str, complaint: str, checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=complaint):
        load_hf(checkpoints(variant), mesh=mesh)


def test_a_mesh_for_each_part_must_be_given_for_each() -> None:
    mesh = make_mesh(expert=2)
    assert resolve_placement({"thinker": mesh, "talker": mesh}, parts_of("tiny", "thinker")).meshes == {"thinker": mesh}
    with pytest.raises(InputError, match="no mesh is given for the code2wav"):
        resolve_placement({"thinker": mesh, "talker": mesh}, parts_of("tiny"))
    assert parse_parts("thinker:expert=2;talker:data=2", ("thinker",))["talker"] == {"data": 2}


@pytest.mark.parametrize(
    "mesh, words",
    [
        ({"thinker": "expert=2"}, "the mesh of the thinker is 'expert=2'; give one of omni_jax.sharding.make_mesh"),
        (jax.make_mesh((2,), ("x",)), "the mesh of the thinker is Mesh.*; give one of"),
        (jax.make_mesh((1, 1, 2, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 4), "the mesh of the thinker is"),
        ({"thinker": make_mesh(), "speaker": make_mesh()}, "a mesh is given for 'speaker', and no part is called so"),
    ],
    ids=["text", "other axes", "explicit axes", "no part"],
)
def test_only_meshes_of_make_mesh_are_taken(mesh: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve_placement(mesh, parts_of("tiny", "thinker"))


@pytest.mark.parametrize("stated", [lambda: jax.devices()[3], lambda: None, lambda: "cpu"], ids=["3", "none", "cpu"])
def test_without_a_mesh_the_default_device_is_taken(
    stated: Callable[[], Any], checkpoints: Callable[[str], Path]
) -> None:
    with jax.default_device(stated()):
        params = oj.load(checkpoints("tiny"), parts=("code2wav",)).params
    expected = jax.devices()[3 if isinstance(stated(), jax.Device) else 0]
    assert {device for x in jax.tree.leaves(params) for device in x.devices()} == {expected}


def test_a_mesh_and_shardings_exclude_each_other(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="not both"):
        load_hf(checkpoints("tiny"), mesh="expert=2", shardings={})


def test_memory_that_a_device_does_not_tell() -> None:
    assert budget.memory_limit(jax.devices()[0]) is None
    assert budget.memory_limit(SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7})) == 7
    assert budget.memory_limit(SimpleNamespace()) is None


@pytest.fixture(scope="module")
def ours(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Thinker of "tiny", converted."""
    directory = tmp_path_factory.mktemp("placement") / "ours"
    convert_checkpoint(checkpoints("tiny"), directory)
    return directory


def test_refused_before_any_array_is_read(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "restore", lambda *args: pytest.fail("the arrays were read"))
    with pytest.raises(InputError, match="does not divide the thinker's num_experts 16"):
        oj.load(ours, mesh=make_mesh(jax.devices()[:3], expert=3))
    with_memory(monkeypatch, 0.001)
    with pytest.raises(CheckpointError, match="each device would hold"):
        oj.load(ours)


def test_an_automatic_mesh_says_why(ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    need = parts_of("tiny", "thinker")[0].bytes_on_a_device({"expert": 4}) * 2 / 1e9
    with_memory(monkeypatch, need * 1.01 / 0.9)
    omni = oj.load(ours, mesh="auto", parts=("thinker",))
    assert omni.mesh_reason.startswith("expert=4,data=2: ") and omni.meshes["thinker"].size == 8
    assert len(omni.params["thinker"]["layers"]["moe"]["down"].devices()) == 8
    with_memory(monkeypatch, 141)
    main(["inspect", "--model", str(ours), "--mesh", "auto"])
    assert "mesh data=8: the model over 1 device, " in capsys.readouterr().out


def test_inspect_tells_what_a_mesh_weighs(ours: Path, capsys: pytest.CaptureFixture) -> None:
    main(["inspect", "--model", str(ours), "--mesh", "expert=4,data=2"])
    shown = capsys.readouterr().out
    main(["inspect", "--model", str(ours), "--mesh", "expert=8", "--json"])
    told = capsys.readouterr().out
    (thinker,) = parts_of("tiny", "thinker")
    held = json.loads(told)["device_bytes"]["thinker"]
    assert held == {"mesh": "expert=8", "bytes": 2 * thinker.weight_bytes({"expert": 8})}
    assert "on each device of expert=4,data=2: " in shown and "of the talker's weights" in shown
    with pytest.raises(SystemExit):
        main(["inspect", "--model", str(ours), "--mesh", "expert=3"])
    assert "does not divide the thinker's num_experts 16" in capsys.readouterr().err


def test_the_command_line_answers_on_a_mesh(ours: Path, capsys: pytest.CaptureFixture) -> None:
    ask = ["generate", "--model", str(ours), "--text", "Why?", "--max-new-tokens", "4", "--json"]
    main(ask)
    alone = json.loads(capsys.readouterr().out)["token_ids"]
    main([*ask, "--mesh", "auto"])
    assert "mesh data=1: the model over 1 device" in capsys.readouterr().err
    main([*ask, "--mesh", "expert=4"])
    assert json.loads(capsys.readouterr().out)["token_ids"] == alone
