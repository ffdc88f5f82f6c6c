"""Processes that prepare data beside training, or none.

Workers are started afresh (not forked), hold a copy of the recipe, never import jax, and end with the process that
started them, however it ends.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

from omni_jax.errors import InputError
from omni_jax.train.data.recipe import Recipe

# What NumPy's linear algebra reads when a worker loads it. Threads of several workers, and of training, would wait for
# each other on the same cores: log-mels took twelve times the processor's time.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_recipe: Any = None  # of a worker


class Workers:
    """Runs `act(recipe, *arguments)`, where `act` is a function of a module, in one of `count` processes.

    With a count of 0, each call runs here and at once.
    """

    def __init__(self, recipe: Recipe, count: int):
        self.recipe, self.count, self._pool = recipe, count, None
        if count:
            started = (pickle.dumps(recipe),)
            for name, threads in ONE_THREAD.items():
                os.environ.setdefault(name, threads)
            self._pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=started)

    def submit(self, act: Callable[..., Any], *arguments: Any) -> Future:
        """Begin a call; see `result_of`."""
        done: Future = Future()
        try:
            if self._pool is not None:
                return self._pool.submit(_run, act, *arguments)
            done.set_result(act(self.recipe, *arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """End the processes; calls that have not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def result_of(call: Future) -> Any:
    """The result of a call, or what it raised; InputError if its process was killed."""
    try:
        return call.result()
    except BrokenProcessPool as error:
        remedy = "memory may have run out: use fewer workers, smaller media, or a smaller max_length"
        raise InputError(f"a process that prepares data was killed; {remedy}") from error


def _start(recipe: bytes) -> None:
    global _recipe
    # An interrupt is handled by the process that trains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _recipe = pickle.loads(recipe)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(act: Callable[..., Any], *arguments: Any) -> Any:
    return act(_recipe, *arguments)


def collate(recipe: Recipe, rows: list[list[bytes]], count: int, width: int) -> Any:
    """What `recipe.collate` makes of pickled samples. It is here because workers import no module of the loop."""
    return recipe.collate([[pickle.loads(sample) for sample in row] for row in rows], count, width)
