"""Supervised fine-tuning of the Thinker: all parameters of its text model, and of what else is asked for.

The trained model is written as a converted checkpoint with all parts that its source had, in the types that they had
there, so that `omni_jax.load` takes it, and `python -m convert --reverse` makes a Hugging Face directory of it.
"""

from dataclasses import dataclass
from functools import partial

from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.train.losses.thinker import thinker_loss
from omni_jax.train.objective import Batches, Objective, Step, cast, check_trainable, masters
from omni_jax.train.saving import save_part
from omni_jax.train.settings import TextRecipe
from omni_jax.train.shown import masked_text
from omni_jax.train.text import text_batches
from omni_jax.weights.trees import flatten, nest

# What turns an encoder's features into the text model's tokens.
MERGERS = ("vision/merger/", "vision/deepstack/", "audio/proj1/", "audio/proj2/")


@dataclass(frozen=True, kw_only=True)
class Sft(TextRecipe):
    """Train the Thinker on what assistants say in conversations; its encoders stay as they are unless asked for."""

    NAME = "sft"

    freeze_text: bool = False
    """Leave the text model as it is."""
    train_vision: bool = False
    """Train the vision encoder too, without its mergers."""
    train_audio: bool = False
    """Train the audio encoder too, without its projections into the text model."""
    train_mergers: bool = False
    """Train the mergers of vision and the projections of audio too."""

    def objective(self, omni: Omni) -> Objective:
        """The Thinker's loss, of the parameters that are trained; InputError if none are."""
        check_trainable(omni.config.thinker.text)
        declaration, arrays = omni.declarations["thinker"], flatten(omni.params["thinker"])
        axes, trained = flatten(declaration.axes), {path for path in arrays if self.trains(path)}
        if not trained:
            raise InputError("nothing is trained; leave out --freeze-text, or train another part of the model")
        dtype = self.compute.type()
        frozen = cast({path: x for path, x in arrays.items() if path not in trained}, dtype)
        loss = partial(thinker_loss, declaration=declaration, dtype=dtype, remat=self.compute.remat == "layer")
        return Objective(
            nest(masters({path: arrays[path] for path in arrays if path in trained})),
            nest(frozen),
            nest({path: axes[path] for path in arrays if path in trained}),
            loss,
            partial(save_part, "thinker", self.run.model, omni.meshes["thinker"]),
        )

    def trains(self, path: str) -> bool:
        """Whether the array at a path of the Thinker is trained."""
        if path.startswith(MERGERS):
            return self.train_mergers
        encoders = {"vision": self.train_vision, "audio": self.train_audio}
        return encoders.get(path.split("/")[0], not self.freeze_text)

    def batches(self, omni: Omni) -> Batches:
        """The batches of the data, for the mesh of the model; InputError where no row can be used."""
        return text_batches(self, omni)

    def shown(self, omni: Omni, step: Step) -> str:
        """A batch as text, with what is learned of it."""
        return masked_text(step, omni.processor.tokenizer)
