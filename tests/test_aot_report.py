"""How memory is planned from programs that were compiled for fewer rows. Nothing is compiled here."""

from types import SimpleNamespace

import pytest

from scripts.aot.programs import Program
from scripts.aot.report import groups
from scripts.aot.tables import COLUMNS, MESH_COLUMNS, TRAIN_COLUMNS, Row, mesh_table, table, temporaries, train_table


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
