"""A model on disk, whatever form it has there: what loading, inspecting and placing need to know of it.

`checkpoint.open_converted`, `hf.open_hf` -> StoredModel -> parts to place -> `read`, once the placement is known
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from omni_jax.config import OmniConfig
from omni_jax.inputs.processor import Processor
from omni_jax.models.param import Declaration
from omni_jax.weights.budget import Part, describe_part
from omni_jax.weights.shards import Shardings


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model on disk whose headers were read and checked, and none of its weights.

    directory: where its files are. kind: its form, in words. config: of the model, without the parts that the
    checkpoint lacks. declarations: of the parts that are to be loaded. types: by path, the dtype in which each of their
    arrays is read. read: reads them onto the devices of the shardings that it is given.
    """

    directory: Path
    kind: str
    config: OmniConfig
    declarations: Mapping[str, Declaration]
    types: Mapping[str, str]
    read: Callable[[Shardings], dict]

    def processor(self) -> Processor:
        """What turns messages into this model's inputs, from its tokenizer, template and media settings."""
        return Processor.from_dir(self.directory, self.config)

    def parts(self, dtype: str | None = None) -> list[Part]:
        """What placing the parts needs to know of them, with their arrays in `dtype`, by default as they are read."""
        return [
            describe_part(part, declaration, self.config, self.types, dtype)
            for part, declaration in self.declarations.items()
        ]
