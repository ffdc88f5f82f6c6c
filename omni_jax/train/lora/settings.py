"""Which projections are adapted, with what rank, and how much the update counts."""

from dataclasses import dataclass
from pathlib import Path

from omni_jax.config import DecoderConfig
from omni_jax.errors import InputError
from omni_jax.inputs.values import shown
from omni_jax.models.low_rank import TARGETS, LowRankConfig
from omni_jax.weights.adapter_config import AdapterConfig, scale_of

ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """Which projections of the text model are adapted, and how."""

    targets: tuple[str, ...] = ("attention", "mlp")
    """Some of attention (or q, k, v, o one by one), experts, mlp (plain MLPs and shared experts) and router."""
    rank: int = 8
    """Rank of the factors."""
    alpha: float = 32.0
    """The update counts alpha / rank."""
    rslora: bool = False
    """The update counts alpha / sqrt(rank) instead."""
    adapter: Path | None = None
    """Adapter to train on from, of the same targets and rank; by default a new one, which changes nothing yet."""

    @property
    def scale(self) -> float:
        """What the product of two factors counts."""
        return scale_of(self.alpha, self.rank, self.rslora)

    def for_model(self, text: DecoderConfig) -> LowRankConfig:
        """What a text model is declared with; InputError for settings that cannot be, or that would adapt nothing."""
        for name, value, valid in (("rank", self.rank, self.rank >= 1), ("alpha", self.alpha, 0 < self.alpha < 1e9)):
            if not valid:
                raise InputError(f"--{name} is {shown(value)}; it must be above 0")
        unknown = [name for name in self.targets if name not in ("attention", *TARGETS)]
        if unknown:
            raise InputError(f"--targets: {shown(unknown[0])} is none of {', '.join(('attention', *TARGETS))}")
        named = {one for name in self.targets for one in (ATTENTION if name == "attention" else (name,))}
        targets = tuple(name for name in TARGETS if name in named and name in present(text))
        if not targets:
            raise InputError(f"--targets {' '.join(self.targets)}: this model has none; take some of {present(text)}")
        return LowRankConfig(targets, self.rank, self.scale)

    def adapter_config(self, base: str) -> AdapterConfig:
        """What the file of a trained adapter says; base: the model that it was trained on."""
        return AdapterConfig(self.rank, self.alpha, self.rslora, base=base)


def present(text: DecoderConfig) -> tuple[str, ...]:
    """The targets that a text model has."""
    routed = len(text.dense_layers) < text.num_layers
    plain = bool(text.dense_layers or text.shared_expert_intermediate_size)
    has = {"experts": routed, "router": routed, "mlp": plain}
    return tuple(name for name in TARGETS if has.get(name, True))
