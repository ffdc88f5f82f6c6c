"""What is compiled for the report, and how its figures are read and memory is planned. Nothing is compiled here."""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from omni_jax.config import OmniConfig
from omni_jax.models.param import declare
from omni_jax.omni import PARTS
from omni_jax.ops import attention, moe
from omni_jax.quantization import stating
from omni_jax.sharding import make_mesh
from scripts.aot import report as report_module
from scripts.aot.kernels import Work
from scripts.aot.plot import drawn, plot
from scripts.aot.programs import DRAWN, Program, Target, lower_decode, lower_piece, programs
from scripts.aot.report import gpu_branches, groups, watched, without
from scripts.aot.tables import (
    COLUMNS,
    KERNEL_COLUMNS,
    MESH_COLUMNS,
    PART_COLUMNS,
    TRAIN_COLUMNS,
    Row,
    kernel_tables,
    mesh_table,
    table,
    temporaries,
    train_table,
)
from scripts.small.configs import config_dict


def row(program: str, temp_gb: float, rows: int, slots: int) -> Row:
    return Row(program, "tokamax", temp_gb=temp_gb, cache=(rows, slots))


COMPILED = [
    row("prefill 1x4096", 0.3, 1, 4096),
    row("prefill 8x4096", 2.0, 8, 4096),
    row("verify 8x8, 4096 slots", 0.2, 8, 4096),
    row("verify 64x8, 4096 slots", 0.8, 64, 4096),
    row("speech frames 8, 1024 slots", 9.0, 8, 1024),
]


@pytest.mark.parametrize(
    "count, slots, gigabytes",
    [
        (1, 256, 0.3),  # nothing shrinks below what was compiled
        (8, 4096, 0.3),
        (16, 4096, 0.4),  # twice the smaller program, less than the larger one
        (64, 4096, 0.8),
        (640, 4096, 8.0),
        (4, 65536, 4.8),  # one prompt of 16 times the tokens is more than these steps need
        (112, 65536, 22.4),
    ],
)
def test_temporaries_grow_with_rows_and_tokens(count: int, slots: int, gigabytes: float) -> None:
    assert temporaries(COMPILED, count, slots) == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize(
    "sizes, rows, number",
    [({"expert": 8}, 8, 1), ({"data": 2, "expert": 4}, 8, 2), ({"data": 2, "expert": 4}, 1, 1), ({"data": 2}, 4, 2)],
)
def test_devices_that_exchange_share_their_tokens(sizes: dict[str, int], rows: int, number: int) -> None:
    target = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **sizes}))
    program = Program("decode", "thinker", True, (rows, 4096), lambda: None, rows)
    assert groups(target, program) == number  # pyright: ignore


def test_every_line_of_a_table_has_all_columns() -> None:
    rows = [*COMPILED, Row("decode", "tiled", error="out | of memory")]
    for lines, columns in ((table(rows), COLUMNS), (mesh_table(rows), MESH_COLUMNS)):
        assert lines.splitlines()[0] == "| " + " | ".join(columns) + " |"
        assert {line.count("|") for line in lines.splitlines()} == {len(columns) + 1}


def test_what_was_found_is_drawn_beside_what_it_must_reach(tmp_path: Path) -> None:
    figures = {"expected_ms": 2.5, "needed_gb": 4.3, "launches": 700}
    rows = [
        Row("decode 1, 2048 slots", "tokamax", **figures),
        Row("sound", "", expected_ms=1.0),
        Row("x", "", error="no"),
    ]
    found = [asdict(row) for row in rows]
    time, launches = drawn(found).axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["sound", "decode 1, 2048 slots"]
    (least,), (goal,) = time.lines, launches.lines
    assert least.get_xydata().tolist() == [[1.0, 1.0]] and goal.get_xydata().tolist() == [[800.0, 1.0]]
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert plot([tmp_path / "found.json"], tmp_path / "found.png") == 0
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_step_needs_what_is_held_and_the_larger_work() -> None:
    held = {"trained": 10**10, "moments": 2 * 10**10, "gradients": 10**10, "frozen": 10**9}
    add = Row("sft add", "tokamax", temp_gb=60.0, new_gb=4.0, tokens=1000, collectives={"all-gather": (2, 3 * 10**6)})
    update = Row("sft update", "", temp_gb=5.0)
    failed = Row("sft add", "tokamax", error="out | of memory")
    lines = train_table("fsdp=8", "1 x 4096", [("sft", held, add, update), ("sft", held, failed, update)]).splitlines()
    assert {line.count("|") for line in lines} == {len(TRAIN_COLUMNS) + 1}
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[3:8] == ["10.0, 20.0, 10.0", "1.0", "64.0, 5.0", "105.0", "yes / yes"]
    assert cells[8:] == ["2 all-gather", "0.0", "3.0"]


def test_times_inside_and_outside_of_command_buffers_are_beside_each_other() -> None:
    line = table([Row("decode", "tokamax", expected_ms=1.25, hosted_ms=2.5)]).splitlines()[2]
    cells = dict(zip(COLUMNS, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
    assert (cells["expected ms"], cells["expected ms, launched by the host"]) == ("1.25", "2.50")


def test_kernels_and_parts_of_each_program() -> None:
    kernel = Work("fusion.7", "fusion", "attention", 48, 3 * 10**6, 10**6, 2 * 10**9, 250.0)
    part = Work("attention", "", "attention", 96, 3 * 10**6, 10**6, 2 * 10**9, 500.0)
    made = [
        Row("decode", "tokamax", expected_ms=1.0, slowest=[kernel], parts=[part]),
        Row("decode", "tiled", error="failed"),
        Row("sound", "", expected_ms=2.0, slowest=[kernel, kernel], parts=[part]),
    ]
    lines = kernel_tables(made).splitlines()
    assert [line for line in lines if line and line[0] != "|"] == [
        "decode, tokamax: the 1 kernels of the most expected time",
        "decode, tokamax: by named part",
        "sound: the 2 kernels of the most expected time",
        "sound: by named part",
    ]
    widths = {len(KERNEL_COLUMNS) + 1, len(PART_COLUMNS) + 1}
    assert {line.count("|") for line in lines if line.startswith("|")} == widths
    assert "| fusion.7 | fusion | 48 | 3.00 | 1.00 | 2.00 | 250.0 | attention |" in lines
    assert "| attention | 96 | 3.00 | 1.00 | 2.00 | 500.0 | 50.0% |" in lines


@cache
def tiny(quantize: str | None = None) -> Target:
    """The tiny model on this machine."""
    config, devices = OmniConfig.from_hf(stating(config_dict("tiny"), quantize)), make_mesh()
    declared = {part: declare(module, getattr(config, part), mesh=None) for part, module in PARTS.items()}
    return Target(config, declared, jax.devices()[0], devices, jnp.dtype(jnp.bfloat16))


def test_bytes_of_what_is_watched_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts in eight bits every number is one byte, whatever the type of the computation."""
    monkeypatch.setattr(report_module, "SMALLEST_WATCHED", 1)
    target = tiny("int8")
    found = watched(target, Program("decode", "thinker", 1, None, lambda: None))
    leaves = jax.tree_util.tree_leaves_with_path(target.declarations["thinker"].shapes)
    eight = [leaf for _, leaf in leaves if leaf.dtype == jnp.int8]
    assert eight
    for leaf in eight:
        assert "moe" in found[leaf.size // leaf.shape[0]]


def test_without_a_package_nobody_finds_or_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("tokamax")
    fake.__spec__ = SimpleNamespace(name="tokamax")
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    with without("tokamax"):
        assert find_spec("tokamax") is None
        with pytest.raises(ModuleNotFoundError):
            import tokamax  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert sys.modules["tokamax"] is fake
    with without("no_such_package"):
        pass
    assert "no_such_package" not in sys.modules


@pytest.mark.parametrize("tokamax", [True, False])
def test_tiled_is_without_tokamax_in_attention_too(tokamax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("tokamax")
    fake.__spec__ = SimpleNamespace(name="tokamax")
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    monkeypatch.setattr(attention, "is_hopper", lambda: True)
    q = jax.ShapeDtypeStruct((1, 256, 2, 2, 64), jnp.bfloat16)
    with ExitStack() as stack:
        for patch in gpu_branches(tiny(), tokamax):
            stack.enter_context(patch)
        assert attention.fits_kernel(q) is tokamax  # pyright: ignore
        assert (moe.find_spec("tokamax") is not None) is tokamax


def test_programs_of_drawn_replies_and_long_prompts_are_among_those_reported() -> None:
    named = {program.name: program for program in programs(tiny())}
    assert named["decode 1, 2048 slots, drawn"].cache == (1, 2048)
    assert named["prefill 1x32768"].cache == (1, 32768)
    assert named["piece 1x512 after 32768"].cache == (1, 65536)


def test_a_drawn_reply_takes_candidates_and_a_piece_changes_its_cache_in_place() -> None:
    greedy, drawn = (lower_decode(tiny(), 1, 256, sampling).as_text() for sampling in (None, DRAWN))
    assert "top_k" in drawn and "threefry" in drawn
    assert "threefry" not in greedy
    piece = lower_piece(tiny(), 16, 256)
    donated = [info for info in jax.tree.leaves(piece.args_info) if info.donated]
    assert {info.shape[3] for info in donated if len(info.shape) == 5} == {512}
