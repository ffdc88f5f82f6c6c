"""The whole Thinker against transformers, on checkpoints that differ in every size, and what generation promises."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omni_jax as oj
from convert import convert_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.decode import media
from omni_jax.decode.media import encode_media
from omni_jax.decode.text import forward, prefill
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import bind
from omni_jax.omni import Omni
from omni_jax.ops.cache import KVCache, lengthen
from tests.convert.conftest import as_first_format
from tests.helpers.prompts import PROMPTS
from tests.parity import image_part, reference_inputs, user, video_part

VARIANTS = ("tiny", "small", "odd")
ATOL = 5e-4
MARGIN = 2e-3


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", (*VARIANTS, "nano"))
def test_logits_equal_the_reference(
    variant: str, prompt: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    import torch

    omni = omnis(variant)
    conversations, hear = PROMPTS[prompt]
    for padding in ("right", "left")[: 2 if len(conversations) > 1 else 1]:
        batch = omni.prepare(conversations, use_audio_in_video=hear, padding=padding)
        with torch.no_grad():
            want = reference(variant).thinker(**reference_inputs(omni.processor, conversations, batch, hear)).logits
        got, want = np.asarray(omni.logits(batch))[batch.mask], want.numpy()[batch.mask]
        assert np.abs(want).max() > 10, "a scale at which the tolerance means something"
        np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("prompt", ["text", "image", "audio", "audio in video", "mixed"])
@pytest.mark.parametrize("variant", (*VARIANTS, "nano"))
def test_greedy_tokens_equal_the_reference(
    variant: str, prompt: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    import torch

    omni, new = omnis(variant), 24
    conversations, hear = PROMPTS[prompt]
    batch = omni.prepare(conversations, use_audio_in_video=hear)
    inputs = reference_inputs(omni.processor, conversations, batch, hear)
    with torch.no_grad():
        out = reference(variant).thinker.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    want = out.sequences[0, batch.token_ids.shape[1] :].tolist()
    got = omni.generate(conversations[0], max_new_tokens=new, use_audio_in_video=hear, stop_ids=()).token_ids
    assert len(got) == new
    best = np.stack([torch.topk(step[0], 2).values.numpy() for step in out.logits])
    close = np.flatnonzero(best[:, 0] - best[:, 1] <= MARGIN)
    # From the first close decision on either token is right, and the texts may part.
    certain = close[0] if close.size else new
    assert certain >= 8 and got[:certain] == want[:certain]


def test_cached_decoding_equals_teacher_forcing(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("odd")
    conversations, _ = PROMPTS["mixed"]
    reply = omni.generate(conversations[0], max_new_tokens=12, stop_ids=())
    batch = omni.prepare(conversations)
    n = batch.token_ids.shape[1]
    ids = np.concatenate([batch.token_ids, np.array([reply.token_ids], np.int32)], axis=1)
    more = n + np.arange(12) + batch.rope_delta[0]
    whole = dataclasses.replace(
        batch,
        token_ids=ids,
        mask=np.ones_like(ids, bool),
        position_ids=np.concatenate([batch.position_ids, np.broadcast_to(more, (3, 1, 12))], axis=2).astype(np.float32),
        visual_index=np.pad(batch.visual_index, ((0, 0), (0, 12)), constant_values=-1),
        audio_index=np.pad(batch.audio_index, ((0, 0), (0, 12)), constant_values=-1),
    )
    logits = np.asarray(omni.logits(whole))[0, n - 1 : -1]
    best = np.sort(logits, axis=-1)[:, -2:]
    certain = best[:, 1] - best[:, 0] > MARGIN
    np.testing.assert_array_equal(logits.argmax(-1)[certain], np.array(reply.token_ids)[certain])
    assert certain.sum() >= 10
    np.testing.assert_allclose(cached_logits(omni, batch, reply.token_ids), logits, atol=ATOL, rtol=0)


def cached_logits(omni: Omni, batch: Batch, token_ids: list[int]) -> np.ndarray:
    """Logits float32 [n, V] before each of n reply tokens, from a cache that is extended by 1, 4, 4, ... tokens."""
    text, params = omni.config.thinker.text, omni.params["thinker"]
    thinker = bind(omni.declarations["thinker"], params)
    n, media = batch.token_ids.shape[1], encode_media(params, batch, omni.declarations["thinker"])
    cache = KVCache.empty(text.num_layers, 1, text.num_kv_heads, n + len(token_ids), text.head_dim, np.float32)
    x = thinker.embed_tokens(batch.token_ids, media)
    out = thinker.prefill(x, batch.position_ids, cache, media=media)
    logits = [thinker.logits(out.hidden[0, -1:])]
    for start in (0, *range(1, len(token_ids) - 1, 4)):
        ids = np.array([token_ids[start : 1 if start == 0 else min(start + 4, len(token_ids) - 1)]])
        at = n + start + np.arange(ids.shape[1]) + batch.rope_delta[0]
        position_ids = np.broadcast_to(at, (3, 1, ids.shape[1])).astype(np.float32)
        out = thinker.extend(thinker.embed_tokens(ids), position_ids, out.cache)
        logits.append(thinker.logits(out.hidden[0]))
    return np.concatenate(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tapped_hidden_states_are_those_of_the_reference(
    variant: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    import torch

    omni = omnis(variant)
    conversations, _ = PROMPTS["image"]
    batch = omni.prepare(conversations)
    params = omni.params["thinker"]
    thinker = bind(omni.declarations["thinker"], params)
    media = encode_media(params, batch, omni.declarations["thinker"])
    L = omni.config.thinker.text.num_layers
    taps = (0, 1, 2, L - 1, L)
    x = thinker.embed_tokens(batch.token_ids, media)
    got = thinker.forward(x, batch.position_ids, media=media, taps=taps).taps
    inputs = reference_inputs(omni.processor, conversations, batch)
    with torch.no_grad():
        want = reference(variant).thinker(**inputs, output_hidden_states=True).hidden_states
    for tap, state in zip(taps, got, strict=True):
        expected = want[tap].numpy()
        np.testing.assert_allclose(state, expected, atol=1e-5 * np.abs(expected).max(), rtol=0, err_msg=f"state {tap}")


def test_a_row_does_not_depend_on_its_batch_mates(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    conversations, _ = PROMPTS["unequal rows"]
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    seeds = [3, 1, 4, 1]
    together = omni.generate(conversations, seed=seeds, **settings)
    for conversation, seed, row in zip(conversations, seeds, together, strict=True):
        assert omni.generate(conversation, seed=seed, **settings).token_ids == row.token_ids


def test_rows_stop_on_their_own(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    conversations, _ = PROMPTS["unequal rows"]
    free = omni.generate(conversations, max_new_tokens=40, stop_ids=())
    stop = free[1].token_ids[6]
    replies = omni.generate(conversations, max_new_tokens=40, stop_ids=[stop])
    for unstopped, reply in zip(free, replies, strict=True):
        ids = unstopped.token_ids
        want = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert reply.token_ids == want
        assert reply.stats["finish_reason"] == ("stop" if stop in ids else "length")
        assert reply.stats["new_tokens"] == len(want)


@pytest.mark.parametrize("new", [1, 2, 9, 33, 34, 70])
def test_stream_equals_generate(new: int, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    (messages,), _ = PROMPTS["image"]
    options = {"max_new_tokens": new, "temperature": 0.9, "seed": 11, "stop_ids": ()}
    reply = omni.generate(messages, **options)
    events = list(omni.stream(messages, **options))
    assert len(reply.token_ids) == new
    assert "".join(event.text for event in events) == reply.text == events[-1].reply.text
    assert [i for event in events for i in event.token_ids] == reply.token_ids == events[-1].reply.token_ids
    assert all("\ufffd" not in event.text or "\ufffd" in reply.text for event in events)
    assert len(events) >= 1 + (new - 1) // 8


def test_the_cache_grows_without_changing_the_reply(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    messages = user("Count on and on.")
    long = omni.generate(messages, max_new_tokens=300, stop_ids=())
    assert len(long.token_ids) == 300
    short = omni.generate(messages, max_new_tokens=90, stop_ids=())
    assert long.token_ids[:90] == short.token_ids


def test_the_same_seed_gives_the_same_reply_and_another_does_not(omnis: Callable[[str], Omni]) -> None:
    omni, messages = omnis("tiny"), user("Say something.")
    options = {"max_new_tokens": 16, "temperature": 1.5, "stop_ids": ()}
    first, again, other = (omni.generate(messages, seed=seed, **options).token_ids for seed in (7, 7, 8))
    assert first == again != other
    assert omni.generate(messages, seed=2**40 + 7, **options).token_ids != first, "all bits of a seed count"


def test_the_penalty_discourages_repetition(omnis: Callable[[str], Omni]) -> None:
    omni, messages = omnis("tiny"), user("Say it again.")
    plain = omni.generate(messages, max_new_tokens=60, stop_ids=()).token_ids
    prompt = set(omni.prepare(messages).token_ids[0].tolist())
    penalised = omni.generate(messages, max_new_tokens=60, repetition_penalty=50.0, stop_ids=()).token_ids
    assert len(set(plain)) < len(set(penalised)) == 60 and not prompt & set(penalised)


def test_typed_placeholders_are_text(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    reply = omni.generate(user("What does <|audio_pad|> or <|image_pad|> mean?"), max_new_tokens=3)
    assert reply.stats["new_tokens"] == 3


def test_the_modules_and_steps_work_under_jit_and_grad(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    batch = omni.prepare(user("Differentiate me."))
    params = omni.params["thinker"]

    def loss(params: dict) -> jax.Array:
        first = np.zeros(1, np.int32)
        logits = forward(
            params, batch.token_ids, batch.position_ids, first, None, declaration=omni.declarations["thinker"]
        )
        return -jax.nn.log_softmax(logits[0, :-1])[
            np.arange(batch.token_ids.shape[1] - 1), batch.token_ids[0, 1:]
        ].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.abs(grads["layers"]["moe"]["down"]).max() > 0
    step = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    assert loss(step) < value
    assert omni.thinker.embed[...].shape == params["embed"].shape


def test_a_converted_checkpoint_loads_as_what_it_was(
    checkpoints: Callable[[str], Path], omnis: Callable[[str], Omni], tmp_path: Path
) -> None:
    converted = tmp_path / "odd"
    convert_checkpoint(checkpoints("odd"), converted, progress=False)
    original = (checkpoints("odd") / "config.json").read_text()
    assert json.loads((converted / "config.json").read_text()) == json.loads(original)
    omni = oj.load(converted)
    assert omni.config == OmniConfig.from_hf(json.loads(original)) == omnis("odd").config
    jax.tree.map(np.testing.assert_array_equal, omni.params, omnis("odd").params)
    assert set(oj.load(converted, parts=("thinker",)).params) == {"thinker"}
    with pytest.raises(InputError, match="ears"):
        oj.load(converted, parts=("ears",))

    values = json.loads(original)
    values["thinker_config"]["text_config"]["num_hidden_layers"] -= 1
    (converted / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="config.json: .*restore the file"):
        oj.load(converted)
    with pytest.raises(CheckpointError, match=r"asks for .* the checkpoint holds"):
        oj.load(as_first_format(converted))
    with pytest.raises(InputError, match="int8"):
        oj.load(converted, dtype="int8")


def test_half_precision_answers_alone_and_in_a_batch(omnis: Callable[[str], Omni]) -> None:
    full = omnis("small")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params)
    half = Omni(params, full.config, full.processor)
    conversations = PROMPTS["unequal rows"][0][:2]
    batch = half.prepare(conversations)
    got, want = (np.asarray(omni.logits(batch), np.float32)[batch.mask] for omni in (half, full))
    # bfloat16 keeps 8 bits: a bound on what a sane run loses, not a parity tolerance.
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.25 * np.sqrt(np.mean(want**2))
    together = half.generate(conversations, max_new_tokens=4, stop_ids=())
    assert [len(reply.token_ids) for reply in together] == [4] * len(conversations)
    assert half.generate(conversations[1], max_new_tokens=4, stop_ids=()).stats["new_tokens"] == 4


def test_prompts_of_many_sizes_share_programs(omnis: Callable[[str], Omni]) -> None:
    omni, before = omnis("small"), prefill._cache_size()
    sides = [(200, 150), (210, 140), (130, 260), (160, 230), (180, 180), (300, 130), (150, 250), (220, 170)]
    prompts = [user(image_part(*a, 1), image_part(*b, 2), "Compare.") for a, b in itertools.pairwise(sides)]
    for messages in prompts:
        omni.generate(messages, max_new_tokens=1)
    batches = [omni.prepare(messages) for messages in prompts]
    assert len({batch.token_ids.shape for batch in batches}) > 3, "prompts that differ in earnest"
    assert prefill._cache_size() - before <= 3


def test_many_frames_are_encoded_a_few_at_a_time(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    omni = omnis("small")
    batch = omni.prepare(user(video_part(18, 60, 90)))
    whole = encode_media(omni.params["thinker"], batch, omni.declarations["thinker"])
    monkeypatch.setattr(media, "MAX_PATCHES", 64)
    media.encode_vision.clear_cache()
    parts = encode_media(omni.params["thinker"], batch, omni.declarations["thinker"])
    media.encode_vision.clear_cache()
    np.testing.assert_allclose(parts.visual, whole.visual, atol=1e-5)
    np.testing.assert_allclose(parts.deepstack, whole.deepstack, atol=1e-5)


def test_the_cache_holds_exactly_what_is_asked(omnis: Callable[[str], Omni]) -> None:
    omni, messages = omnis("small"), user("Fill it.")
    n = omni.prepare(messages).token_ids.shape[1]
    before = lengthen._cache_size()
    reply = omni.generate(messages, max_new_tokens=256 - n, stop_ids=())
    assert len(reply.token_ids) == 256 - n and lengthen._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least one token"),
        ({"max_new_tokens": 10**6}, "context of"),
        ({"stop_ids": [10**6]}, "outside the vocabulary"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seeds for 1"),
        ({"seed": None}, "seed"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"stop_ids": 5}, "list of token ids"),
        ({"stop_ids": [5.7]}, "no whole number"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "a number"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str, omnis: Callable[[str], Omni]) -> None:
    with pytest.raises(InputError, match=message):
        omnis("tiny").generate(user("Hello"), **options)
    if options.get("seed") != [1, 2]:
        with pytest.raises(InputError, match=message):
            omnis("tiny").stream(user("Hello"), **options)


def test_a_batch_cannot_be_streamed(omnis: Callable[[str], Omni]) -> None:
    with pytest.raises(InputError, match="one conversation"):
        omnis("tiny").stream([user("a"), user("b")])
