"""The Talker's loss against transformers' labels, and against what the decoding loop sees of the same codes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.talker_loop import SpeechPlan, SpeechValues, TalkerPrompt, decode_frames, prefill_talker
from omni_jax.errors import InputError
from omni_jax.models.param import bind
from omni_jax.omni import Omni
from omni_jax.ops.cache import capacity_for
from omni_jax.settings import Voice
from omni_jax.sharding import make_mesh, place_rows, shardings
from omni_jax.train.losses.talker import LossWeights, listen, spoken_columns, talker_loss
from omni_jax.train.talker import listener
from omni_jax.train.talker_batch import SpeechBatch
from omni_jax.weights.trees import flatten
from tests.helpers.arrays import close
from tests.helpers.speech import SpeechExample, batch_of, random_codes, reference_losses
from tests.helpers.training import reference_gradients
from tests.parity import audio_part, image_part, user, video_part

TURNS = [
    {"role": "system", "content": "You speak briefly."},
    *user(image_part(60, 48, 4), "What is it?"),
    {"role": "assistant", "content": "A wave."},
    *user(audio_part(0.6, 5), video_part(2, 48, 48, 2.0, 6), "And this?"),
]
WEIGHTS = LossWeights(talker=0.7, predictor=1.3, router=0.4)


def examples(omni: Omni) -> list[SpeechExample]:
    """A row with media whose text ends before its speech, and a shorter one whose text is cut off."""
    return [
        SpeechExample(TURNS, "A chirp.", random_codes(omni, 14, 1), "ethan", "d:1"),
        SpeechExample(user("Hello"), "Some more words than there are frames.", random_codes(omni, 5, 2), "MO", "d:2"),
    ]


@pytest.fixture(scope="module")
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("odd")


@pytest.fixture(scope="module")
def batch(omni: Omni) -> SpeechBatch:
    """The examples and a row of padding."""
    return batch_of(omni, examples(omni), rows=3)


def loss_of(omni: Omni, batch: SpeechBatch, mesh: Any = None, **settings: Any) -> Callable[[dict, dict], Any]:
    """The loss of params and frozen arrays, for `value_and_grad`: its total, and all of it."""
    thinker, talker = listener(omni)[0], omni.declarations["talker"]
    if mesh is not None:
        thinker, talker = replace(thinker, mesh=mesh), replace(talker, mesh=mesh)

    def total(params: dict, frozen: dict) -> Any:
        loss = talker_loss(params, frozen, batch, talker=talker, thinker=thinker, **settings)
        return loss.total, loss

    return total


def frozen_of(omni: Omni) -> dict:
    return {"talker": {}, "thinker": listener(omni)[1]}


def test_losses_and_gradients_equal_the_reference(
    omni: Omni, batch: SpeechBatch, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    want = reference_losses(reference("odd"), omni, examples(omni), WEIGHTS)
    theirs = flatten(reference_gradients(reference("odd"), "talker", tmp_path / "gradients"))
    run = jax.jit(jax.value_and_grad(loss_of(omni, batch, weights=WEIGHTS), has_aux=True))
    (_, got), gradient = run(omni.params["talker"], frozen_of(omni))
    assert float(got.weight) == 14 + 1 + 5 + 1
    for name in ("talker_loss", "predictor_loss", "auxiliary_loss"):
        close(got.metrics[name], want.losses[name], 1e-4)
    close(got.total, want.total, 1e-4)
    mine = flatten(gradient)
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        assert np.abs(np.asarray(theirs[path])).max() > 0, path
        close(value, theirs[path], 1e-4)


def hidden_states(omni: Omni, batch: SpeechBatch) -> jax.Array:
    """What the Talker hears of the prompts, from the whole Thinker, [B, T, D]."""
    assert omni.config.talker is not None and batch.thinker is not None
    layer = omni.config.talker.accept_hidden_layer
    run = jax.jit(partial(listen, declaration=omni.declarations["thinker"], layer=layer))
    return run(omni.params["thinker"], batch.thinker)


def spoken(omni: Omni, rows: list[SpeechExample], hidden: jax.Array, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """What the decoding loop draws for texts of rows: codes [B, Q, frames], and the states [B, frames + 1, D] it has.

    First codes are drawn, the others are the likeliest.
    """
    config, talker, declaration = omni.config, omni.params["talker"], omni.declarations["talker"]
    assert config.talker is not None
    said = [omni.processor.tokenizer.encode_plain(row.reply) for row in rows]
    voice = Voice(speaker=[row.speaker for row in rows], max_frames=frames + 1)
    request = SpeechRequest.read(omni.prepare([row.messages for row in rows]), voice, config).begun(said)
    drawing = Sampling(temperature=0.9), Sampling()
    plan = SpeechPlan(drawing[0].plan(config.talker.text.vocab_size), drawing[1].plan(128))
    values, embed, prompt = (
        SpeechValues(*(one.values() for one in drawing)),
        omni.params["thinker"]["embed"],
        request.padded(),
    )
    state = prefill_talker(
        talker, embed, TalkerPrompt(prompt, request.budget, row_keys([3, 4], 2)), hidden, values,
        declaration=declaration, plan=plan, capacity=capacity_for(prompt.text_ids.shape[1] + frames),
    )  # fmt: skip
    texts = np.full((len(rows), frames), config.tts_pad_token_id, np.int32)
    for row, ids in zip(texts, said, strict=True):
        text = [*ids[1:], config.tts_eos_token_id][:frames]
        row[: len(text)] = text
    states, codes = [np.asarray(state.hidden)], []
    for t in range(frames):
        made, state = decode_frames(
            talker, embed, state, texts[:, t : t + 1], np.ones(2, np.int32), values, declaration=declaration, plan=plan
        )
        codes.append(np.asarray(made.codes))
        states.append(np.asarray(state.hidden))
    return np.concatenate(codes, axis=2), np.stack(states, axis=1)


def test_the_trained_layout_is_the_spoken_one(omni: Omni, batch: SpeechBatch) -> None:
    """The loop's own codes, given to the loss, lead to the states that the loop had."""
    rows, frames, declaration = examples(omni), 9, omni.declarations["talker"]
    hidden = hidden_states(omni, batch)[:2]
    codes, states = spoken(omni, rows, hidden, frames)
    assert codes.min() >= 0 and len(np.unique(codes[:, 0])) > frames
    again = [replace(row, codes=own) for row, own in zip(rows, codes, strict=True)]
    taught = replace(batch_of(omni, again), thinker=None, hidden=hidden)

    @jax.jit
    def run(params: dict, frozen: dict) -> Any:
        talker = bind(declaration, params)
        columns = spoken_columns(talker, taught, frozen["thinker"]["embed"], hidden)
        out = talker.forward(columns.x, columns.position_ids, columns.first_valid)
        return out.hidden[:, columns.prompt - 1 :], talker_loss(params, frozen, taught, talker=declaration)

    got, loss = run(omni.params["talker"], {"talker": {}, "thinker": {"embed": omni.params["thinker"]["embed"]}})
    close(got[:, : frames + 1], states, 1e-4)
    assert float(loss.weight) == 2 * (frames + 1)
    assert float(loss.metrics["predictor_accuracy"]) == pytest.approx(2 * frames), "the likeliest codes were drawn"


def test_media_are_heard_as_by_the_whole_thinker(omni: Omni, batch: SpeechBatch) -> None:
    declaration, params = listener(omni)
    assert omni.config.talker is not None and batch.thinker is not None
    assert "lm_head" not in params
    assert len(params["layers"]["qkv"]) == 6 < omni.config.thinker.text.num_layers
    run = jax.jit(partial(listen, declaration=declaration, layer=omni.config.talker.accept_hidden_layer))
    close(run(params, batch.thinker), hidden_states(omni, batch))
    with pytest.raises(InputError, match="give thinker="):
        talker_loss({}, {"talker": omni.params["talker"], "thinker": params}, batch, talker=omni.declarations["talker"])


def test_a_mesh_changes_nothing(omnis: Callable[[str], Omni]) -> None:
    omni, mesh = omnis("tiny"), make_mesh(fsdp=2, expert=2, tensor=2)
    said = [(3, "One."), (6, "Two words."), (2, "Three."), (5, "Four and more.")]
    rows = [
        SpeechExample(user(image_part(60, 48, n), "Why?"), text, random_codes(omni, n, n), "ethan", f"d:{n}")
        for n, text in said
    ]
    batch = batch_of(omni, rows)
    declarations = omni.declarations["talker"], listener(omni)[0]
    params, frozen = omni.params["talker"], frozen_of(omni)
    one = jax.jit(jax.value_and_grad(loss_of(omni, batch), has_aux=True))(params, frozen)
    on = shardings(declarations[0].axes, mesh), {"talker": {}, "thinker": shardings(declarations[1].axes, mesh)}
    placed = jax.device_put(params, on[0]), jax.device_put(frozen, on[1])
    many = jax.jit(jax.value_and_grad(loss_of(omni, place_rows(batch, mesh), mesh), has_aux=True))(*placed)
    for name, value in one[0][1].metrics.items():
        close(many[0][1].metrics[name], value)
    close(many[0][0], one[0][0])
    for path, value in flatten(one[1]).items():
        close(flatten(many[1])[path], value, 1e-4)


def test_half_precision_and_recomputation_keep_the_loss(omni: Omni) -> None:
    params, frozen, batch = omni.params["talker"], frozen_of(omni), batch_of(omni, examples(omni)[1:])
    first, *others = (
        jax.jit(loss_of(omni, batch, **settings))(params, frozen)[0]
        for settings in ({}, {"remat": False}, {"dtype": jnp.bfloat16})
    )
    close(others[0], first, 1e-6)
    close(others[1], first, 2e-2)
