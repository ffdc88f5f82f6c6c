"""Measure how near decoding comes to the speed at which memory is read: a step reads its weights once.

One row decodes greedily after a short prompt. Before each repetition, all cores read an array of a gigabyte. "Weights a
token" are the decoder's, of its routed experts those that a token chooses, and the head; the cache is left out.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import jax
import numpy as np

from omni_jax.inputs.batch import Batch
from scripts.bench.compare import write_json
from scripts.bench.options import Text
from scripts.bench.system import prompts
from scripts.bench.thinker import OurThinker, our_thinker

GIGABYTE = 1e9


def read_speed(size: float = GIGABYTE) -> float:
    """Bytes per second that all cores read of an array of `size` bytes, each its own share."""
    cores = os.cpu_count() or 1
    shares = np.ones((cores, int(size) // 4 // cores), np.float32)

    def read(share: np.ndarray) -> float:
        return float(np.dot(share, share))

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(read, shares))
        start = time.perf_counter()
        list(pool.map(read, shares))
        return shares.nbytes / (time.perf_counter() - start)


def weights_of_a_token(params: dict, experts: int, chosen: int) -> int:
    """Bytes of the Thinker's parameters that one token reads, of `experts` experts those `chosen`."""

    def read(path: Any, leaf: Any) -> float:
        names = [key.key for key in path]
        size = prod(leaf.shape) * leaf.dtype.itemsize
        return size * chosen / experts if "moe" in names and "router" not in names else size

    parts = {name: params[name] for name in ("layers", "norm", "lm_head")}
    return round(sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(read, parts))))


def measure(model: OurThinker, options: Text) -> dict[str, float]:
    """The medians of the repetitions, after a warm-up."""
    batch = Batch.of_text(prompts(1, options.prompt))
    model.decode_all(batch, options.new)
    speeds, tokens = [], []
    for _ in range(options.run.repetitions):
        speeds.append(read_speed())
        tokens.append((options.new - 1) / model.decode_all(batch, options.new).decode_seconds)
    size = weights_of_a_token(model.params, model.text.num_experts, model.text.experts_per_token)
    speed, reached = statistics.median(speeds), statistics.median(tokens)
    return {
        "weights_per_token_bytes": size,
        "read_bytes_per_second": speed,
        "most_tokens_per_second": speed / size,
        "tokens_per_second": reached,
        "share": reached * size / speed,
    }


def report(options: Text) -> None:
    """Measure, print, and write the JSON if asked for."""
    found = measure(our_thinker(options.run, None), options)
    print(
        f"{options.run.shape}, {options.run.dtype}, {options.run.quantize or 'not quantised'}, {options.new} new tokens"
    )
    print(f"weights a token, MB       {found['weights_per_token_bytes'] / 1e6:10.1f}")
    print(f"memory is read at, GB/s   {found['read_bytes_per_second'] / 1e9:10.1f}")
    print(f"so at most, tokens/s      {found['most_tokens_per_second']:10.1f}")
    print(f"decoded, tokens/s         {found['tokens_per_second']:10.1f}")
    print(f"of what memory gives      {found['share']:10.2f}")
    write_json(options.run.json, options, found)
