"""Conversations and texts as batches for the Thinker, for recipes that train on them."""

from omni_jax.inputs.options import read_defaults
from omni_jax.omni import Omni
from omni_jax.sharding import round_up_rows
from omni_jax.train.data import samples, stream
from omni_jax.train.data.plan import Packing
from omni_jax.train.data.text import text_batch
from omni_jax.train.objective import Batches
from omni_jax.train.settings import TextRecipe


def text_recipe(settings: TextRecipe, omni: Omni) -> samples.TextRecipe:
    """How rows become samples of the Thinker; InputError for options of media, or a length, that cannot be."""
    prompt = settings.prompt
    options = read_defaults(settings.media.options(), prompt.fps, prompt.use_audio_in_video)
    return samples.TextRecipe.of(
        omni.processor, settings.batch.max_length, prompt.thinking, options, settings.batch.coarse
    )


def text_batches(settings: TextRecipe, omni: Omni) -> Batches:
    """The batches that settings ask for, each a `TextBatch`; rows are rounded up to what the model's mesh divides.

    InputError for options of media that cannot be, and where no row can be used.
    """
    run, batch, recipe = settings.run, settings.batch, text_recipe(settings, omni)
    packing = Packing(round_up_rows(batch.rows, omni.meshes["thinker"]), batch.max_length, several=not batch.unpacked)
    epochs = run.epochs if run.steps is None else None
    return stream.open_stream(
        run.data, recipe, text_batch, packing, seed=run.seed, epochs=epochs, workers=batch.workers, strict=batch.fatal
    )
