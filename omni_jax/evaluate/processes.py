"""Which samples each process of an evaluation runs, and which process writes and reports.

Where every process holds a whole model of its own, each takes its share of the samples and writes its own file. Where
one model is spread over the processes, all must run the same programs in the same order: every process runs all
samples, and the first writes. Processes share the output directory; `run.Results` and `command` wait for each other
there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process's part: every `step`-th sample from `first` on; whether it writes them, and whether it reports."""

    process: int
    first: int
    step: int
    writes: bool
    reports: bool

    def of(self, samples: Sequence[T]) -> list[T]:
        """The samples of this process."""
        return list(samples[self.first :: self.step])


def share(process: int, processes: int, own_model: bool) -> Share:
    """The part of process number `process` of `processes`; own_model: whether each holds a whole model."""
    if own_model:
        return Share(process, process, processes, writes=True, reports=process == 0)
    return Share(process, 0, 1, writes=process == 0, reports=process == 0)


def share_of(params: Any) -> Share:
    """The part of this process, which holds these parameters, or some of them."""
    return share(jax.process_index(), jax.process_count(), own_model=not shares_model(params))


def shares_model(params: Any) -> bool:
    """Whether several processes hold these parameters together, so that an error may be that of another process."""
    return not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
