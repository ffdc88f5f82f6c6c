"""DFlash against a statement of it in PyTorch, written from its description: no cache, one row at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_tiny_drafter import draft_config_dict
from safetensors.numpy import load_file

from omni_jax.drafter import load_drafter
from omni_jax.models.dflash import DFlash
from omni_jax.models.param import bind

torch = pytest.importorskip("torch")
VARIANTS = ("tiny", "small", "odd")
B, SLOTS = 3, 48
# Tokens of each row that are real: of the prompt, then of each round.
COUNTS = ((9, 5, 1), (3, 1, 6), (1, 6, 2), (6, 6, 6), (2, 1, 4))


class Statement:
    """The drafter of one row: everything that was remembered, as it was given, and one pass over it per block."""

    def __init__(self, directory: Path, config: dict):
        files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        self.w = {k.removeprefix("model."): torch.tensor(v) for part in files for k, v in part.items()}
        self.eps, self.layers = config["rms_norm_eps"], config["num_hidden_layers"]
        self.head, self.groups = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.types = config.get("layer_types", ["full_attention"] * self.layers)
        self.window, self.is_causal = config["sliding_window"], config.get("is_causal")
        self.context = torch.zeros(0, config["hidden_size"])

    def norm(self, x: Any, name: str) -> Any:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.w[f"{name}.weight"]

    def linear(self, x: Any, name: str) -> Any:
        return x @ self.w[f"{name}.weight"].T

    def turn(self, x: Any, position: Any) -> Any:
        """[tokens, heads, head]: pairs are (i, i + head / 2)."""
        half = self.head // 2
        angle = position[:, None, None] * self.theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def remember(self, features: Any) -> None:
        self.context = torch.cat([self.context, self.norm(self.linear(features, "fc"), "hidden_norm")])

    def keys_values(self, x: Any, i: int, start: int) -> tuple[Any, Any]:
        """Of tokens x [tokens, D] from position `start` on, by layer i: [tokens, kv heads, head]."""
        p = f"layers.{i}.self_attn"
        k = self.norm(self.linear(x, f"{p}.k_proj").unflatten(-1, (-1, self.head)), f"{p}.k_norm")
        v = self.linear(x, f"{p}.v_proj").unflatten(-1, (-1, self.head))
        return self.turn(k, torch.arange(start, start + len(x))), v

    def draft(self, x: Any) -> Any:
        """Embedded block [W, D] -> normed states [W, D]."""
        P, W = len(self.context), len(x)
        position, key = torch.arange(P, P + W), torch.arange(P + W)
        for i in range(self.layers):
            p, normed = f"layers.{i}.self_attn", self.norm(x, f"layers.{i}.input_layernorm")
            q = self.turn(
                self.norm(self.linear(normed, f"{p}.q_proj").unflatten(-1, (-1, self.head)), f"{p}.q_norm"), position
            )
            parts = [self.keys_values(self.context, i, 0), self.keys_values(normed, i, P)]
            k, v = (torch.cat(both).repeat_interleave(self.groups, dim=1) for both in zip(*parts, strict=True))
            scores = torch.einsum("qnh,knh->nqk", q, k) / self.head**0.5
            scores = scores.masked_fill(~self.visible(i, position[:, None], key), -torch.inf)
            attended = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).flatten(1)
            x = x + self.linear(attended, f"{p}.o_proj")
            m, normed = f"layers.{i}.mlp", self.norm(x, f"layers.{i}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self.linear(normed, f"{m}.gate_proj"))
            x = x + self.linear(gate * self.linear(normed, f"{m}.up_proj"), f"{m}.down_proj")
        return self.norm(x, "norm")

    def visible(self, i: int, query: Any, key: Any) -> Any:
        sliding = self.types[i] == "sliding_attention"
        causal = sliding if self.is_causal is None else self.is_causal
        seen = torch.ones(len(query), len(key), dtype=torch.bool)
        if causal:
            seen &= key <= query
        if sliding:
            seen &= (query - key).abs() < self.window
        return seen


def close(got: Any, want: Any, relative: float = 1e-5) -> None:
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=relative * np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_equal_the_statement(variant: str, drafters: Callable[[str, str], Path]) -> None:
    torch.set_num_threads(1)
    directory, config = drafters("dflash", variant), draft_config_dict(variant, "dflash")
    drafter = load_drafter(directory)
    module, W = drafter.module, drafter.config.block_size
    assert isinstance(module, DFlash)
    rows = [Statement(directory, config) for _ in range(B)]
    rng, D = np.random.default_rng(5), config["hidden_size"]
    width = module.fc.weight.shape[1]

    @partial(jax.jit, donate_argnums=1)
    def step(params: dict, cache: Any, features: Any, count: Any, block: Any) -> tuple:
        module = bind(drafter.graph, params)
        context = module.fuse(features)
        cache = module.remember(cache, context, count)
        return *module.draft(block, cache), context

    cache = module.empty(B, SLOTS, jnp.float32)
    for count in COUNTS:
        T = max(*count, W)
        features = rng.standard_normal((B, T, width)).astype(np.float32)
        # What is not real may be anything.
        features[np.arange(T) >= np.asarray(count)[:, None]] *= 100
        block = 0.7 * rng.standard_normal((B, W, D)).astype(np.float32)
        hidden, cache, context = step(drafter.params, cache, features, jnp.asarray(count), block)
        for b, row in enumerate(rows):
            row.remember(torch.tensor(features[b, : count[b]]))
            close(context[b, : count[b]], row.context[-count[b] :])
            close(hidden[b], row.draft(torch.tensor(block[b])))
    assert cache.length.tolist() == [len(row.context) for row in rows] == [21, 19, 19]
    for b, row in enumerate(rows):
        for i in range(row.layers):
            k, v = row.keys_values(row.context, i, 0)
            close(cache.k[i, b, :, : len(k)].swapaxes(0, 1), k)
            close(cache.v[i, b, :, : len(v)].swapaxes(0, 1), v)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_alone_equals_the_batch(variant: str, drafters: Callable[[str, str], Path]) -> None:
    drafter = load_drafter(drafters("dflash", variant))
    module, W = drafter.module, drafter.config.block_size
    assert isinstance(module, DFlash)
    rng, D = np.random.default_rng(6), module.fc.weight.shape[0]
    features = jnp.asarray(rng.standard_normal((B, 11, module.fc.weight.shape[1])), jnp.float32)
    block = jnp.asarray(rng.standard_normal((B, W, D)), jnp.float32)
    count = jnp.asarray([11, 4, 7])

    def run(rows: slice) -> jax.Array:
        cache = module.empty(len(count[rows]), SLOTS, jnp.float32)
        return module.draft(block[rows], module.remember(cache, module.fuse(features[rows]), count[rows]))[0]

    together = run(slice(None))
    for b in range(B):
        close(run(slice(b, b + 1)), together[b : b + 1])
