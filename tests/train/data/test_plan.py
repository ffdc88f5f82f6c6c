"""Which samples each batch holds: all of them once, none beyond its row, the same from the same seed."""

import numpy as np
import pytest

from omni_jax.train.data.plan import ENDLESS, Packing, Plan, batches_of, shuffled

LENGTHS = np.random.default_rng(0).integers(2, 90, 500)


def samples(batches: list) -> list[int]:
    return [i for batch in batches for row in batch.rows for i in row]


@pytest.mark.parametrize("packing", [
    Packing(4, 100), Packing(4, 100, window=32), Packing(7, 96, window=5), Packing(4, 100, several=False),
    Packing(4, 100, several=False, window=3), Packing(600, 100, several=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("n", [1, 3, 500])
def test_every_sample_once_and_no_row_too_long(packing: Packing, n: int) -> None:
    batches = batches_of(LENGTHS[:n], packing, 3, 0)
    assert sorted(samples(batches)) == list(range(n))
    for batch in batches:
        most = max(int(LENGTHS[list(row)].sum()) for row in batch.rows)
        assert most <= batch.width <= packing.width and all(batch.rows)
        assert packing.several or all(len(row) == 1 for row in batch.rows)
    # Only one batch may have rows to spare.
    assert sum(len(batch.rows) < packing.rows for batch in batches) <= 1
    assert all(len(batch.rows) <= packing.rows for batch in batches)


def test_rows_are_filled_and_widths_are_few() -> None:
    packed = batches_of(LENGTHS, Packing(4, 200), 0, 0)
    assert LENGTHS.sum() / sum(4 * batch.width for batch in packed) > 0.9
    alone = batches_of(LENGTHS, Packing(4, 200, several=False), 0, 0)
    assert {batch.width for batch in alone} <= {16, 24, 32, 48, 64, 96}
    assert LENGTHS.sum() / sum(4 * batch.width for batch in alone) > 0.75


def test_epochs_differ_and_seeds_repeat() -> None:
    packing = Packing(4, 100)
    plan, again, other = (Plan(LENGTHS, packing, seed, 3) for seed in (1, 1, 2))
    assert list(plan) == list(again) != list(other)
    epochs = [[plan[i] for i in range(plan.start_of(e), plan.start_of(e + 1))] for e in range(3)]
    assert len(plan) == sum(map(len, epochs)) == plan.start_of(3)
    assert all(sorted(samples(epoch)) == list(range(500)) for epoch in epochs)
    assert samples(epochs[0]) != samples(epochs[1]) != samples(epochs[2])
    assert [plan.epoch_of(i) for i in (0, len(epochs[0]) - 1, len(epochs[0]), len(plan) - 1)] == [0, 0, 1, 2]
    # A later one is found without those before it, as after a resumption.
    assert Plan(LENGTHS, packing, 1, 3)[len(plan) - 1] == plan[len(plan) - 1]


def test_epochs_without_an_end() -> None:
    plan = Plan(LENGTHS[:5], Packing(1, 100), 0, None)
    assert len(plan) == ENDLESS and plan[1000].rows


def test_the_order_is_the_same_everywhere() -> None:
    """Raw bits of Philox, which NumPy promises to keep."""
    assert shuffled(10, 0, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert sorted(shuffled(1000, 5, 2, 1)) == list(range(1000))
    assert shuffled(0, 0, 0, 0).tolist() == []
