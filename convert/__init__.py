"""Convert Hugging Face checkpoints to sharded Orbax ones and back; `python -m convert --help` for the command line.

convert_checkpoint(SRC, DST)   safetensors -> sharded Orbax, streamed
reverse_checkpoint(DST, SRC)   and back, bit for bit
verify_checkpoint(DST)         compare every tensor with its stored SHA-256
load_hf(SRC)                   safetensors -> arrays on devices, nothing written
write_drafter(DRAFTER, DST)    a drafter in the layout that it was loaded from
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.convert import convert_checkpoint
    from convert.reverse import reverse_checkpoint
    from convert.verify import verify_checkpoint
    from omni_jax.errors import MismatchError
    from omni_jax.weights.drafter_files import write_drafter
    from omni_jax.weights.hf import load_hf

__all__ = [
    "MismatchError",
    "convert_checkpoint",
    "load_hf",
    "reverse_checkpoint",
    "verify_checkpoint",
    "write_drafter",
]

# The module of each public name, imported on first use, so that the command answers at once.
_PUBLIC = {
    "MismatchError": "omni_jax.errors",
    "convert_checkpoint": "convert.convert",
    "load_hf": "omni_jax.weights.hf",
    "reverse_checkpoint": "convert.reverse",
    "verify_checkpoint": "convert.verify",
    "write_drafter": "omni_jax.weights.drafter_files",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
