"""The recipe `lora`: low-rank updates of the Thinker's projections, trained and written by themselves."""

import sys
from dataclasses import dataclass, field
from functools import partial

import jax
from tyro.conf import OmitArgPrefixes

from omni_jax.distributed import is_primary
from omni_jax.omni import Omni
from omni_jax.train.lora.objective import lora_objective
from omni_jax.train.lora.settings import LowRankSettings
from omni_jax.train.lora.table import adapted_table
from omni_jax.train.losses.thinker import thinker_loss
from omni_jax.train.objective import Batches, Objective, Step, check_trainable
from omni_jax.train.settings import Optimizer, TextRecipe
from omni_jax.train.shown import masked_text
from omni_jax.train.text import text_batches


@dataclass(frozen=True, kw_only=True)
class Lora(TextRecipe):
    """Train a LoRA adapter of the Thinker's text model on what assistants say; the model stays as it is."""

    NAME = "lora"
    NEXT = "--adapter {} uses it, and so does PEFT"

    optimizer: OmitArgPrefixes[Optimizer] = field(default_factory=lambda: Optimizer(learning_rate=1e-4))
    lora: OmitArgPrefixes[LowRankSettings] = field(default_factory=LowRankSettings)

    def objective(self, omni: Omni) -> Objective:
        """The Thinker's loss, of the factors alone; what is adapted, and what is not, is listed on stderr."""
        check_trainable(omni.config.thinker.text)
        dtype, remat = self.compute.type(), self.compute.remat == "layer"
        loss = partial(thinker_loss, dtype=dtype, remat=remat)
        made = lora_objective(self.lora, omni, loss, dtype, self.run.seed, str(self.run.model))
        whole = sum(x.size for x in jax.tree.leaves(omni.params["thinker"]))
        declaration = made.loss.keywords["declaration"]  # type: ignore[attr-defined]
        if is_primary():
            print(adapted_table(omni.config, declaration, whole), file=sys.stderr)
        return made

    def batches(self, omni: Omni) -> Batches:
        """The batches of the data, for the mesh of the model; InputError where no row can be used."""
        return text_batches(self, omni)

    def shown(self, omni: Omni, step: Step) -> str:
        """A batch as text, with what is learned of it."""
        return masked_text(step, omni.processor.tokenizer)
