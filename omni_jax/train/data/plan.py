"""Which samples each batch of an epoch holds: a list that follows from lengths and the seed alone.

The shuffled samples are taken in windows. Within one, samples are packed first-fit into rows, the longest first; rows
of like length form batches, and the batches are shuffled. Samples that do not fill a batch go on into the next window,
so that only the last batch of an epoch has rows to spare. The sizes of batches are few: `rows` by a bucketed width.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock

import numpy as np

from omni_jax.inputs.batch import bucket

MIN_WIDTH = 16  # tokens of the narrowest batch
ENDLESS = 1 << 62  # batches of a plan whose epochs have no end


@dataclass(frozen=True)
class PlannedBatch:
    """Numbers of the samples in each row of a batch, and its width in tokens."""

    rows: tuple[tuple[int, ...], ...]
    width: int


@dataclass(frozen=True)
class Packing:
    """How samples are arranged.

    rows: of a batch. width: most tokens of a row, which no sample exceeds. several: whether a row may hold several
    samples. window: samples that are looked at together.
    """

    rows: int
    width: int
    several: bool = True
    window: int = 1024


class Plan(Sequence[PlannedBatch]):
    """The batches of all epochs, one after the other.

    lengths: tokens of each sample, int [n], n at least 1. epochs: None for no end.
    """

    def __init__(self, lengths: np.ndarray, packing: Packing, seed: int, epochs: int | None):
        self.lengths, self.packing, self.seed, self.epochs = lengths, packing, seed, epochs
        self._starts, self._kept = [0], dict[int, list[PlannedBatch]]()
        self._lock = RLock()  # several threads read ahead

    def __len__(self) -> int:
        return ENDLESS if self.epochs is None else self.start_of(self.epochs)

    def __getitem__(self, index: int) -> PlannedBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        with self._lock:
            epoch = self.epoch_of(index)
            return self._batches(epoch)[index - self._starts[epoch]]

    def start_of(self, epoch: int) -> int:
        """The number of the first batch of an epoch, counted over all epochs."""
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + len(self._batches(len(self._starts) - 1)))
            return self._starts[epoch]

    def epoch_of(self, index: int) -> int:
        """The epoch, from 0, of a batch."""
        while self._starts[-1] <= index:
            self.start_of(len(self._starts))
        return bisect_right(self._starts, index) - 1

    def _batches(self, epoch: int) -> list[PlannedBatch]:
        if epoch not in self._kept:
            self._kept = {e: kept for e, kept in self._kept.items() if e == epoch - 1}
            self._kept[epoch] = batches_of(self.lengths, self.packing, self.seed, epoch)
        return self._kept[epoch]


def batches_of(lengths: np.ndarray, packing: Packing, seed: int, epoch: int) -> list[PlannedBatch]:
    """The batches of one epoch, in which each sample occurs once; lengths: their tokens, int [samples]."""
    order, batches, waiting = shuffled(len(lengths), seed, epoch, 0), list[PlannedBatch](), list[int]()
    for number, start in enumerate(range(0, len(order), packing.window), start=1):
        window = [*waiting, *order[start : start + packing.window].tolist()]
        rows = _rows(window, lengths, packing)
        whole = len(rows) // packing.rows * packing.rows
        if start + packing.window >= len(order):
            whole = len(rows)
        waiting = [sample for row in rows[whole:] for sample in row]
        made = [_batch(rows[at : at + packing.rows], lengths, packing) for at in range(0, whole, packing.rows)]
        batches += [made[i] for i in shuffled(len(made), seed, epoch, number)]
    return batches


def shuffled(n: int, seed: int, epoch: int, part: int) -> np.ndarray:
    """A permutation int [n]; from raw random bits, which are the same in every version of NumPy."""
    bits = np.random.Philox(key=[seed % 2**64, epoch << 32 | part]).random_raw(n)
    return np.argsort(bits, kind="stable")


def _rows(samples: list[int], lengths: np.ndarray, packing: Packing) -> list[list[int]]:
    """Rows of samples, the longest row first."""
    longest = sorted(samples, key=lambda i: -int(lengths[i]))
    if not packing.several:
        return [[i] for i in longest]
    rows: list[list[int]] = []
    room = np.full(len(samples), packing.width)
    for i in longest:
        first = int(np.argmax(room >= lengths[i]))
        rows += [[]] if first == len(rows) else []
        rows[first].append(i)
        room[first] -= lengths[i]
    return sorted(rows, key=lambda row: -int(lengths[row].sum()))


def _batch(rows: list[list[int]], lengths: np.ndarray, packing: Packing) -> PlannedBatch:
    most = max(int(lengths[row].sum()) for row in rows)
    return PlannedBatch(tuple(map(tuple, rows)), min(bucket(max(most, MIN_WIDTH)), packing.width))
