"""The sound of a model's replies, whose first program is compiled while their text and codes are made.

XLA compiles outside Python's lock, so a second core can compile Code2Wav while the first one compiles and runs what
comes before sound. The thread only lowers and compiles: it donates nothing, and the calls that come after find the
program where `jax.jit` keeps its own. It ends with the program, before the interpreter does.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np

from omni_jax.config import Code2WavConfig
from omni_jax.decode.speech.vocode import Vocoder, compile_first, vocode
from omni_jax.models.param import Declaration

# The declaration and the parameters of Code2Wav.
Part = tuple[Declaration, dict]


class Sounds:
    """Sound from codes, and the compilations that were begun for it: one for each number of rows."""

    def __init__(self, part: Callable[[], Part], config: Code2WavConfig | None):
        """part: gives Code2Wav, or raises InputError for a model that is loaded without it. config: its own."""
        self._part, self._config = part, config
        self._begun: dict[int, Future[None]] = {}
        self._lock = Lock()

    def begin(self, rows: int) -> None:
        """Have the program of the first chunks of `rows` rows compiled in a thread of its own, unless it was begun.

        Not where several processes share a mesh: they must all do the same at the same time.
        """
        params, declaration, config = self._given()
        if declaration.mesh is not None and declaration.mesh.is_multi_process:
            return
        with self._lock:
            if rows not in self._begun:
                thread = ThreadPoolExecutor(1, "compile-code2wav")
                self._begun[rows] = thread.submit(compile_first, params, declaration, config, rows)
                thread.shutdown(wait=False)

    def vocoder(self) -> Vocoder:
        """The vocoder of one reply that is heard while it is made; raises what compiling its program raised."""
        self._wait(1)
        return Vocoder(*self._given())

    def of(self, codes: np.ndarray, lengths: list[int] | None = None) -> list[np.ndarray]:
        """The waveform of each row of codes int32 [B, Q, F], of which a row has `lengths` frames; raises likewise."""
        self._wait(len(codes))
        return vocode(*self._given(), codes, lengths)

    def _wait(self, rows: int) -> None:
        """Wait for what was begun; what has failed may begin again."""
        future = self._begun.get(rows)
        if future is not None and future.exception() is not None:
            with self._lock:
                self._begun.pop(rows, None)
            future.result()

    def _given(self) -> tuple[dict, Declaration, Code2WavConfig]:
        declaration, params = self._part()
        assert self._config is not None
        return params, declaration, self._config
