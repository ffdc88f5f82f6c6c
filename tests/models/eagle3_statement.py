"""EAGLE-3 in PyTorch, written from its description: no cache, one row at a time, run from scratch each time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file


class Statement:
    """One row: a list of inputs (hidden state, embedding, position, what each sees), run from scratch each time."""

    def __init__(self, directory: Path, config: dict):
        files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        names = {k: k.removeprefix("model.").replace("layers.0.", "midlayer.") for part in files for k in part}
        self.w = {names[k]: torch.tensor(v) for part in files for k, v in part.items()}
        self.eps, self.heads = config["rms_norm_eps"], config["num_attention_heads"]
        self.groups = self.heads // config["num_key_value_heads"]
        self.head = config.get("head_dim", config["hidden_size"] // self.heads)
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.h: list[Any] = []
        self.embedded: list[Any] = []
        self.position: list[int] = []
        self.sees: list[set[int]] = []

    def norm(self, x: Any, name: str) -> Any:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.w[f"{name}.weight"]

    def linear(self, x: Any, name: str) -> Any:
        return x @ self.w[f"{name}.weight"].T

    def heads_of(self, x: Any, name: str, turned: bool) -> Any:
        x = self.linear(x, f"midlayer.self_attn.{name}_proj").unflatten(-1, (-1, self.head))
        if not turned:
            return x
        half = self.head // 2
        angle = torch.tensor(self.position)[:, None, None] * self.theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

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
