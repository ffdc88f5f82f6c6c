"""The recipe that trains the Talker to speak, from conversations with codes.

    rows -> [talker_data] -> samples -> [talker_batch] -> batches ----.
    a model -> trained: Talker, projections, code predictor -----------+-> losses.talker
            -> frozen: the Thinker up to the layer that the Talker hears, or its embeddings alone

The Thinker never changes, so that the text of replies stays what it is. The trained model is written as a converted
checkpoint with all parts that its source had.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.options import read_defaults
from omni_jax.models.param import Declaration, declare
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.sharding import round_up_rows
from omni_jax.train.codes import Codebooks, Layout, load_encoder
from omni_jax.train.objective import Batches, Objective, Step, cast, check_trainable, masters
from omni_jax.train.saving import save_part
from omni_jax.train.settings import TextRecipe
from omni_jax.weights.trees import flatten, nest

PROJECTIONS = ("text_projection/", "hidden_projection/")
PREDICTOR = "code_predictor/"
# First codes of a sample that are shown.
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class TalkerSft(TextRecipe):
    """Train the Talker and its code predictor on spoken replies; the Thinker stays as it is."""

    NAME = "talker"
    PARTS = ("thinker", "talker")

    freeze_talker: bool = False
    """Leave the text model of the Talker, its code embeddings and its head as they are."""
    freeze_projections: bool = False
    """Leave the projections of the Thinker's embeddings and hidden states as they are."""
    freeze_predictor: bool = False
    """Leave the code predictor as it is, which gives all codes of a frame but the first."""
    talker_weight: float = 1.0
    """What the first codes of frames, and the end, count in the loss."""
    predictor_weight: float = 1.0
    """What the mean over the other codes of a frame counts: 1 in DuplexOmni's recipe for this model, 0.3 in Qwen's own
    for Qwen3-TTS."""
    router_weight: float | None = None
    """What an uneven load on experts counts in the loss; by default as the model's configuration states."""
    mistakes: float = 0.0
    """Share of the codes before that the Talker reads as others, so that it learns to go on from its own mistakes."""
    no_media: bool = False
    """Keep no more of the Thinker than its embeddings, for prompts without pictures, sounds and videos."""
    speaker: str = "ethan"
    """Who speaks in rows that name nobody."""
    encoder: str | None = None
    """module:function that makes codes of samples float32 [n] and their rate, for rows with sound in place of codes."""
    layout: Layout = "auto"
    """The axes of codes: codebooks first (QF), frames first (FQ), or by their shape."""

    def objective(self, omni: Omni) -> Objective:
        """The Talker's loss, of the parameters that are trained; InputError if none are, or weights cannot be."""
        from omni_jax.train.losses.talker import LossWeights, talker_loss

        self._check(omni)
        declaration, arrays = omni.declarations["talker"], flatten(omni.params["talker"])
        axes, trained = flatten(declaration.axes), {path for path in arrays if self.trains(path)}
        if not trained:
            raise InputError("nothing is trained; leave out one of --freeze-talker, -projections and -predictor")
        thinker, heard = (None, {"embed": omni.params["thinker"]["embed"]}) if self.no_media else listener(omni)
        others = nest({path: x for path, x in arrays.items() if path not in trained})
        dtype, weights = self.compute.type(), LossWeights(self.talker_weight, self.predictor_weight, self.router_weight)
        settings = {"weights": weights, "dtype": dtype, "remat": self.compute.remat == "layer"}
        return Objective(
            params=nest(masters({path: x for path, x in arrays.items() if path in trained})),
            frozen=cast({"talker": others, "thinker": heard}, dtype),
            axes=nest({path: axes[path] for path in arrays if path in trained}),
            loss=partial(talker_loss, talker=declaration, thinker=thinker, **settings),
            save=partial(save_part, "talker", self.run.model, omni.meshes["talker"]),
        )

    def trains(self, path: str) -> bool:
        """Whether the array at a path of the Talker is trained."""
        if path.startswith(PREDICTOR):
            return not self.freeze_predictor
        return not (self.freeze_projections if path.startswith(PROJECTIONS) else self.freeze_talker)

    def _check(self, omni: Omni) -> None:
        for name in ("talker_weight", "predictor_weight", "router_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be 0 or more")
        if not 0 <= self.mistakes < 1:
            raise InputError(f"--mistakes is {self.mistakes}; it must be at least 0 and less than 1")
        assert omni.config.talker is not None
        check_trainable(omni.config.talker.text)
        if omni.meshes["thinker"] != omni.meshes["talker"]:
            raise InputError("Thinker and Talker are on meshes of their own; name one mesh for all parts to train")

    def batches(self, omni: Omni) -> Batches:
        """The batches of the data, for the mesh of the model; InputError where no row can be used."""
        from omni_jax.train.data.plan import Packing
        from omni_jax.train.data.stream import open_stream
        from omni_jax.train.talker_batch import speech_batch
        from omni_jax.train.talker_data import SpeechRecipe

        run, batch, prompt = self.run, self.batch, self.prompt
        recipe = SpeechRecipe(
            omni.processor,
            omni.config,
            Codebooks.of(omni.config, self.layout),
            batch.max_length,
            encoder=None if self.encoder is None else load_encoder(self.encoder),
            speaker=self.speaker,
            options=read_defaults(self.media.options(), prompt.fps, prompt.use_audio_in_video),
            enable_thinking=prompt.thinking,
            hears=not self.no_media,
            coarse=batch.coarse,
        )
        packing = Packing(round_up_rows(batch.rows, omni.meshes["talker"]), batch.max_length, several=False)
        epochs = run.epochs if run.steps is None else None
        return open_stream(
            run.data, recipe, partial(speech_batch, mistakes=self.mistakes), packing, seed=run.seed, epochs=epochs,
            workers=batch.workers, strict=batch.fatal,
        )  # fmt: skip

    def shown(self, omni: Omni, step: Step) -> str:
        """A batch as text: each sample's row, what the Talker reads of its prompt, and in brackets what it says."""
        prompt, decode, end = step.batch.prompt, omni.processor.tokenizer.decode, omni.config.tts_eos_token_id
        texts = []
        for b, name in enumerate(step.samples):
            own = slice(prompt.text_ids.shape[1] - int(prompt.length[b]), None)
            ids, heard = prompt.text_ids[b, own], int((prompt.hidden_index[b, own] >= 0).sum())
            read = decode(ids[prompt.hidden_index[b, own] < 0].tolist(), skip_special=False)
            said, first = step.batch.text_ids[b].tolist(), step.batch.codes[b, 0]
            spoken = decode(said[: said.index(end)] if end in said else said)
            codes = " ".join(map(str, first[:SHOWN].tolist()))
            texts.append(f"{name}\n{read}⟦{spoken}⟧ ({heard} of media, {np.sum(first >= 0)} frames: {codes} ...)")
        return "\n\n".join(texts)


def listener(omni: Omni) -> tuple[Declaration, dict[str, Any]]:
    """What of the Thinker the Talker hears: its declaration and parameters, up to the layer that is accepted.

    The layers after it and the head, about half of the public model, are left out.
    """
    config, talker = omni.config.thinker, omni.config.talker
    assert talker is not None
    # The state of number n leaves layer n - 1 before that layer's deepstack feature is added, so it is read there.
    layers = min(talker.accept_hidden_layer + 1, config.text.num_layers)
    dense = tuple(l for l in config.text.dense_layers if l < layers)
    text = replace(config.text, num_layers=layers, dense_layers=dense)
    declaration = declare(Thinker, replace(config, text=text, tie_word_embeddings=True), mesh=omni.meshes["thinker"])
    arrays = flatten(omni.params["thinker"])
    return declaration, nest({path: arrays[path][: x.shape[0]] for path, x in flatten(declaration.shapes).items()})
