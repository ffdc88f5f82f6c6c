"""What placing a model needs to know, and devices of some memory."""

import pytest

from omni_jax.config import OmniConfig
from omni_jax.models.param import declare
from omni_jax.omni import PARTS
from omni_jax.quantization import stating
from omni_jax.weights import budget
from omni_jax.weights.budget import Part, describe_part
from scripts.small.configs import config_dict


def parts_of(variant: str, *names: str, quantize: str | None = None, dtype: str = "bfloat16") -> list[Part]:
    """What placing the parts of a variant needs to know."""
    config = OmniConfig.from_hf(stating(config_dict(variant), quantize))
    declarations = {name: declare(PARTS[name], getattr(config, name)) for name in names or PARTS}
    return [describe_part(name, declaration, config, {}, dtype) for name, declaration in declarations.items()]


def with_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float | None) -> None:
    """Have every device report this much memory, or none."""
    limit = None if gigabytes is None else int(gigabytes * 1e9)
    monkeypatch.setattr(budget, "memory_limit", lambda device: limit)
