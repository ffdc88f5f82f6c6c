"""The drafters in PyTorch, written from their descriptions: no cache, one row at a time, run from scratch each time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file


class Statement:
    """What both share: the weights by the layout's own names, norms, products and turns."""

    def __init__(self, directory: Path, config: dict):
        files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        self.w = {k.removeprefix("model."): torch.tensor(v) for part in files for k, v in part.items()}
        self.eps, self.heads = config["rms_norm_eps"], config["num_attention_heads"]
        self.groups = self.heads // config["num_key_value_heads"]
        self.head = config.get("head_dim", config["hidden_size"] // self.heads)
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

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


class BlockStatement(Statement):
    """The drafter of one row: everything that was remembered, as it was given, and one pass over it per block."""

    def __init__(self, directory: Path, config: dict):
        super().__init__(directory, config)
        self.layers = config["num_hidden_layers"]
        self.types = config.get("layer_types", ["full_attention"] * self.layers)
        self.window, self.is_causal = config["sliding_window"], config.get("is_causal")
        self.context = torch.zeros(0, config["hidden_size"])

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


class StepStatement(Statement):
    """One row: a list of inputs (hidden state, embedding, position, what each sees), run from scratch each time."""

    def __init__(self, directory: Path, config: dict):
        super().__init__(directory, config)
        self.w = {name.replace("layers.0.", "midlayer."): weight for name, weight in self.w.items()}
        self.h: list[Any] = []
        self.embedded: list[Any] = []
        self.position: list[int] = []
        self.sees: list[set[int]] = []

    def heads_of(self, x: Any, name: str, turned: bool) -> Any:
        x = self.linear(x, f"midlayer.self_attn.{name}_proj").unflatten(-1, (-1, self.head))
        return self.turn(x, torch.tensor(self.position)) if turned else x

    def add(self, h: Any, embedded: Any, position: int | None = None, ancestors: Sequence[int] | None = None) -> int:
        """One more input, behind all others by default; returns its number."""
        n = len(self.h)
        self.h.append(h)
        self.embedded.append(torch.as_tensor(embedded))
        self.position.append(n if position is None else position)
        self.sees.append({*(range(n) if ancestors is None else ancestors), n})
        return n

    def forget(self, n: int) -> None:
        """Keep the first n inputs."""
        for kept in (self.h, self.embedded, self.position, self.sees):
            del kept[n:]

    def run(self) -> Any:
        """The outputs [inputs, D], before the norm."""
        h, n = torch.stack(self.h), len(self.h)
        x = torch.cat(
            [self.norm(torch.stack(self.embedded), "midlayer.input_layernorm"), self.norm(h, "midlayer.hidden_norm")],
            dim=-1,
        )
        q = self.heads_of(x, "q", True)
        k = self.heads_of(x, "k", True).repeat_interleave(self.groups, dim=1)
        v = self.heads_of(x, "v", False).repeat_interleave(self.groups, dim=1)
        hidden = torch.tensor([[j not in self.sees[i] for j in range(n)] for i in range(n)])
        scores = (torch.einsum("qnh,knh->nqk", q, k) / self.head**0.5).masked_fill(hidden, -torch.inf)
        h = h + self.linear(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).flatten(1), "midlayer.self_attn.o_proj")
        x = self.norm(h, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(x, "midlayer.mlp.gate_proj"))
        return h + self.linear(gate * self.linear(x, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")

    def logits(self, out: Any) -> Any:
        return self.linear(self.norm(out, "norm"), "lm_head")
