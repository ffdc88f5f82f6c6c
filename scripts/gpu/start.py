"""How long is it from nothing to the first token? A new process each time, with random weights made on the device.

Reading a checkpoint is not in it: that takes as long as the disk takes. Programs come from the cache on disk that the
environment names; a process that had to compile one says so, and is followed by another.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.gpu.sizes import GOALS, START, sizes_of
from scripts.gpu.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from scripts.gpu.start import first_token; first_token(sys.argv[1])"
MOST = 3


def starts(shape: str) -> list[Timing]:
    """The first token of a process that found all programs in the cache, or of the last of MOST processes."""
    began, seconds, told = time.perf_counter(), 0.0, dict[str, Any]()
    for number in range(MOST):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", RUN, shape], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - start
        told = json.loads(done.stdout.splitlines()[-1])
        if number and not told["compiled"]:
            break
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in told["seconds"].items())
    note = f"{told['compiled']} programs compiled, {told['cached']} from the cache; {parts}"
    return [Timing(START, 1e3 * seconds, time.perf_counter() - began, goal=GOALS[START], note=note)]


def first_token(shape: str) -> None:
    """Print the seconds of each part of a start as one line of JSON, once the first token is on the host."""
    counted = {"/jax/compilation_cache/cache_misses": 0, "/jax/compilation_cache/cache_hits": 0}
    seconds, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    import jax
    import numpy as np

    import omni_jax  # noqa: F401

    def count(event: str, **_: Any) -> None:
        if event in counted:
            counted[event] += 1

    jax.monitoring.register_event_listener(count)
    from omni_jax.ops.cache import capacity_for
    from scripts.gpu.speed import make_model

    lap("imports")
    jax.devices()
    lap("device")
    sizes = sizes_of(shape)
    model = make_model(shape, sizes.dtype)
    lap("random weights")
    tokens = sizes.prefill[-1]
    np.asarray(model.prefill(model.request(1, tokens, 1), capacity_for(tokens))[0])
    lap("first token")
    missed, hit = counted.values()
    print(json.dumps({"seconds": seconds, "compiled": missed, "cached": hit}), flush=True)
