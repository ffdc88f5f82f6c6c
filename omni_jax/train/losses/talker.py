"""The Talker's loss, and its code predictor's, on speech in the layout in which the model speaks.

    prompt                     ... codec_bos | frame 0     frame 1    ...  frame F-1
    input    text + codec mark ... text 0    | codes, text 1  codes, text 2  codes, text F
    target                         code 0 of   code 0 of                     the end mark
                                   frame 0     frame 1

An input is the sum of a frame's Q codes, each embedded by its own table, and of one text token: the reply's next one,
the end mark of its text, then padding. The state at each input predicts the first code of the next frame, the last one
the end of the speech. The code predictor reads that state and the frame's codes, and predicts each from those before
it. Prompts are not learned. Source of the layout: `decode/speech/talker_loop.py`, which runs it a frame at a time.

Source of the losses: transformers `Qwen3OmniMoeTalkerForConditionalGeneration` with labels, and its code predictor,
whose head number i predicts code i + 1. Deliberate differences:
- Sums, so that losses of several batches add: a first code counts 1, each of the Q - 1 others of a frame 1 / (Q - 1).
- The reference's code predictor shifts its labels by one place as a text model does, although it gives the logits of
  one codebook at a time; here the last state predicts, as it does when the model speaks.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.speech.talker_loop import prompt_inputs
from omni_jax.errors import InputError
from omni_jax.models.code_predictor import CodePredictor
from omni_jax.models.output import Output
from omni_jax.models.param import Declaration, bind
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.train.batch import IGNORED
from omni_jax.train.losses.cross_entropy import TokenLoss, cross_entropy
from omni_jax.train.losses.thinker import load_balancing_loss
from omni_jax.train.media import encode
from omni_jax.train.objective import Loss, cast
from omni_jax.train.talker_batch import SpeechBatch, ThinkerRows
from omni_jax.weights.trees import flatten, nest


@dataclass(frozen=True)
class LossWeights:
    """What the first codes and the other codes of a frame count, and the load on experts: its own coefficient if None.

    One to one is DuplexOmni's recipe for this model (arXiv 2606.09186); Qwen's own for Qwen3-TTS has 0.3 for the
    predictor.
    """

    talker: float = 1.0
    predictor: float = 1.0
    router: float | None = None


def talker_loss(
    params: dict,
    frozen: dict,
    batch: SpeechBatch,
    *,
    talker: Declaration,
    thinker: Declaration | None = None,
    weights: LossWeights = LossWeights(),
    dtype: Any = jnp.float32,
    remat: bool = True,
) -> Loss:
    """Loss on a batch of speech, a sum over first codes and end marks; pure, for `jit` and `grad`.

    Args:
        params: the arrays that are trained, of the Talker's nested dict of parameters.
        frozen: {"talker": its other arrays, "thinker": those of `thinker`, or {"embed": [V, D]} without media}.
        batch: prompts, texts and codes.
        talker: declaration of the whole Talker, as in `Omni.declarations`.
        thinker: declaration of what runs the media of prompts; not needed if the batch has none, or has hidden states.
        weights: what each loss counts.
        dtype: the type to compute in.
        remat: whether the backward pass computes layers anew instead of keeping what they made.

    Its metrics are "talker_loss" and "predictor_loss" in nats (the latter a mean over codebooks), "talker_accuracy" and
    "predictor_accuracy" (shares of codes that are likeliest), and "auxiliary_loss" of the router without coefficient.
    """
    given: Any = jax.tree.map(jnp.asarray, batch)
    model: Talker = bind(talker, cast(nest({**flatten(frozen["talker"]), **flatten(params)}), dtype))
    kept, layer = cast(frozen["thinker"], dtype), model.config.accept_hidden_layer
    columns = spoken_columns(model, given, kept["embed"], cast(_heard(kept, given, thinker, layer), dtype))
    out = model.forward(columns.x, columns.position_ids, columns.first_valid, columns.counted, remat)
    states = out.hidden[:, columns.prompt - 1 :]
    first = cross_entropy(states, model.codec_head[...], first_targets(given, model.config.codec_eos_id), talker.mesh)
    others = _residual_loss(model.code_predictor, states[:, :-1], columns.embedded, given, talker, remat)
    share = 1 / (model.config.num_code_groups - 1)
    metrics = {
        "talker_loss": first.total,
        "predictor_loss": share * others.total,
        "talker_accuracy": first.correct,
        "predictor_accuracy": share * others.correct,
        "auxiliary_loss": first.count * _auxiliary_loss(model, out, columns),
    }
    router = model.config.text.router_aux_loss_coef if weights.router is None else weights.router
    counts = {"talker_loss": weights.talker, "predictor_loss": weights.predictor, "auxiliary_loss": router}
    return Loss(sum((c * metrics[name] for name, c in counts.items()), jnp.float32(0)), first.count, metrics)


def _auxiliary_loss(talker: Talker, out: Output, columns: "SpokenColumns") -> jax.Array:
    """The load on experts, float32 []: that of all layers and of all columns that are not padding."""
    assert out.load is not None
    return load_balancing_loss(out.load, talker.config.text.num_layers * jnp.sum(columns.counted))


def _heard(params: dict, batch: SpeechBatch, declaration: Declaration | None, layer: int) -> Any:
    """What the Talker hears of media, [B, T, D], as the batch has it or the Thinker makes it; None without media."""
    if batch.hidden is not None or batch.thinker is None:
        return batch.hidden
    if declaration is None:
        raise InputError("the batch has media; give thinker=, the declaration of what hears them, from `listener`")
    return listen(params, batch.thinker, declaration, layer)


def listen(params: dict, rows: ThinkerRows, declaration: Declaration, layer: int) -> jax.Array:
    """Hidden states [B, T, D] number `layer` that a Thinker makes of prompts and their media."""
    thinker: Thinker = bind(declaration, params)
    media = encode(thinker, rows.media)
    x = thinker.embed_tokens(jnp.asarray(rows.token_ids), media)
    out = thinker.forward(x, jnp.asarray(rows.position_ids), jnp.asarray(rows.first_valid), media, taps=(layer,))
    return out.taps[0]


@dataclass(frozen=True)
class SpokenColumns:
    """What the Talker reads of a batch: U columns of its prompt, padded on the left, then F frames.

    x [B, U + F, D]: with what is read of the frames. position_ids float32 [3, B, U + F]. first_valid int32 [B].
    counted bool [B, U + F]: columns that are not padding. embedded [B, F, Q, D]: each code of the frames. prompt: U.
    """

    x: jax.Array
    position_ids: jax.Array
    first_valid: jax.Array
    counted: jax.Array
    embedded: jax.Array
    prompt: int


def spoken_columns(talker: Talker, batch: SpeechBatch, embed: jax.Array, hidden: jax.Array | None) -> SpokenColumns:
    """The Talker's inputs for teacher-forced speech.

    embed [V, D]: the Thinker's token embeddings. hidden [B, T, D]: its accepted hidden states, None without media.
    """
    prompt, codes = batch.prompt, jnp.asarray(batch.codes)
    (B, _, F), U = codes.shape, prompt.text_ids.shape[1]
    embedded = _embedded(talker, codes)
    heard = embedded if batch.read is None else _embedded(talker, jnp.asarray(batch.read))
    text = talker.text_projection(embed[jnp.asarray(batch.text_ids)])
    # In float32, as in decoding: many small numbers, each of which half precision would round.
    x = jnp.sum(heard, axis=2, dtype=jnp.float32) + text
    read = prompt_inputs(talker, embed, prompt, hidden)
    length, t = jnp.asarray(prompt.length), jnp.arange(F, dtype=jnp.float32)
    position = (length + jnp.asarray(prompt.rope_delta))[:, None] + t
    first_valid = U - length
    real = jnp.concatenate([jnp.arange(U) >= first_valid[:, None], codes[:, 0] >= 0], axis=1)
    return SpokenColumns(
        x=jnp.concatenate([read, x.astype(read.dtype)], axis=1),
        position_ids=jnp.concatenate([jnp.asarray(prompt.position_ids), jnp.broadcast_to(position, (3, B, F))], axis=2),
        first_valid=first_valid,
        counted=real,
        embedded=embedded,
        prompt=U,
    )


def _embedded(talker: Talker, codes: jax.Array) -> jax.Array:
    """Each code of int32 [B, Q, F] embedded by its own table, [B, F, Q, D]."""
    frames = jnp.maximum(codes, 0).swapaxes(1, 2)
    parts = talker.embed_codes(frames[..., :1]), talker.code_predictor.embed_codes(frames[..., 1:])
    return jnp.concatenate(parts, axis=2)


def first_targets(batch: SpeechBatch, end: int) -> jax.Array:
    """The first code that each of the F + 1 states after the prompt predicts, int32 [B, F + 1], IGNORED for none.

    end: the id that follows the last frame of a row.
    """
    first = jnp.pad(jnp.asarray(batch.codes)[:, 0], ((0, 0), (0, 1)), constant_values=-1)
    frames = jnp.sum(first >= 0, axis=1, keepdims=True)
    ends = (jnp.arange(first.shape[1]) == frames) & (frames > 0)
    return jnp.where(ends, end, jnp.where(first >= 0, first, IGNORED))


def _residual_loss(
    predictor: CodePredictor,
    states: jax.Array,
    embedded: jax.Array,
    batch: SpeechBatch,
    declaration: Declaration,
    remat: bool,
) -> TokenLoss:
    """Sums over the codes 1 to Q - 1 of all frames, from the states [B, F, D] that predict them, and the codes before.

    embedded: [B, F, Q, D].
    """
    B, F, Q, D = embedded.shape
    x = jnp.concatenate([states[:, :, None], embedded[:, :, :-1].astype(states.dtype)], axis=2)
    out = predictor.forward(x.reshape(B * F, Q, D), remat).reshape(B, F, Q, D)
    codes = jnp.asarray(batch.codes)
    targets = jnp.where(codes >= 0, codes, IGNORED)

    def codebook(sums: TokenLoss, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        hidden, head, wanted = at
        return jax.tree.map(jnp.add, sums, cross_entropy(hidden, head, wanted, declaration.mesh)), None

    each = jnp.moveaxis(out[:, :, 1:], 2, 0), predictor.lm_head[...], jnp.moveaxis(targets[:, 1:], 1, 0)
    return jax.lax.scan(codebook, TokenLoss(*jnp.zeros(3)), each)[0]
