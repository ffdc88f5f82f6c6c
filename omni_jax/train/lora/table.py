"""What an adapter adapts, as a table, and what it leaves out: experts that are left out are easily overlooked."""

from math import prod

from omni_jax.config import OmniConfig
from omni_jax.models.low_rank import TARGETS
from omni_jax.models.param import Declaration
from omni_jax.train.lora.settings import present
from omni_jax.weights.adapter_files import factor_rows
from omni_jax.weights.layout import Leaf

NAMES = {"q": "attention q", "k": "attention k", "v": "attention v", "o": "attention o"}


def adapted_table(config: OmniConfig, declaration: Declaration, whole: int) -> str:
    """A line for each kind of projection: matrices and parameters that are trained, and their share of the model's.

    declaration: of the Thinker with its factors. whole: the parameters of the Thinker itself.
    """
    rows, has = factor_rows(config, "thinker", declaration), present(config.thinker.text)
    lines = [f"{'adapted':<14}{'matrices':>10}{'parameters':>16}{'share':>10}"]
    all_matrices = all_parameters = 0
    for target in TARGETS:
        own = [leaf for leaf in rows if _target(leaf) == target]
        name = NAMES.get(target, target)
        if not own:
            absent = "not adapted" if target in has else "none in this model"
            lines.append(f"{name + ':':<14}{absent:>{len(absent) + 1}}")
            continue
        matrices = sum(prod(leaf.shape[: len(leaf.stack)]) for leaf in own if leaf.path.endswith("/a"))
        parameters = sum(prod(leaf.shape) for leaf in own)
        all_matrices, all_parameters = all_matrices + matrices, all_parameters + parameters
        lines.append(_line(name, matrices, parameters, whole))
    lines.append(f"{'encoders:':<14} not adapted")
    return "\n".join([*lines, _line("all", all_matrices, all_parameters, whole)])


def _line(name: str, matrices: int, parameters: int, whole: int) -> str:
    return f"{name:<14}{matrices:>10,}{parameters:>16,}{parameters / whole:>10.3%}"


def _target(leaf: Leaf) -> str:
    """The target that a row of factors belongs to."""
    *_, owner, holder, name, _ = f"//{leaf.path}".split("/")
    if name == "router_lora":
        return "router"
    if owner == "moe":
        return "experts"
    return name if holder == "lora" and owner == "layers" else "mlp"
