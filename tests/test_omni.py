"""The whole Thinker against transformers, on checkpoints that differ in every size, and what generation promises."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from convert import load_hf
from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.inputs.processor import Processor
from omni_jax.omni import Omni
from tests.parity import audio_part, image_part, reference_inputs, user, video_part

VARIANTS = ("tiny", "small", "odd")
ATOL = 5e-4
MARGIN = 2e-3


@pytest.fixture(scope="session")
def omnis(checkpoints: Callable[[str], Path]) -> Callable[[str], Omni]:
    """`omnis("tiny")` is that checkpoint loaded straight from its safetensors."""

    @cache
    def load(variant: str) -> Omni:
        params, config = load_hf(checkpoints(variant), parts=("thinker",))
        return Omni(params, config, Processor.from_dir(checkpoints(variant), config))

    return load


SPOKEN = Path(__file__).parent / "data" / "hello_with_speech.mp4"
PROMPTS: dict[str, tuple[list[list[dict]], bool]] = {
    "text": ([user("Why is the sky blue?")], False),
    "image": ([user(image_part(120, 90), "What is this?")], False),
    "images": ([user(image_part(64, 200), "and", image_part(150, 100, 3), "differ how?")], False),
    "audio": ([user(audio_part(2.3), "Who speaks?")], False),
    "long audio": ([user("Listen:", audio_part(11.7, 1))], False),
    "short audio": ([user(audio_part(0.3, 2), "A click?")], False),
    "video": ([user(video_part(7, 90, 120), "What happens?")], False),
    "audio in video": ([user({"type": "video", "video": str(SPOKEN), "fps": 0.5}, "What is said?")], True),
    "mixed": (
        [
            user(
                image_part(60, 80, 1),
                audio_part(1.4, 3),
                video_part(5, 70, 60, 1.5),
                "between",
                audio_part(3.1, 4),
                image_part(100, 40, 2),
                "and the end",
            )
        ],
        False,
    ),
    "unequal rows": (
        [
            user("Just words."),
            user(image_part(90, 90, 5), "One picture, and rather more words than in the first row."),
            user(audio_part(1.2, 5), video_part(4, 64, 64, 2.0, 6)),
            user(audio_part(9.4, 6), image_part(40, 130, 7), "Both."),
        ],
        False,
    ),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", VARIANTS)
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
@pytest.mark.parametrize("variant", VARIANTS)
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
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        best = torch.topk(out.logits[i][0], 2).values
        if best[0] - best[1] <= MARGIN:
            return  # from here on either token is right, and the texts may part
        assert a == b, f"token {i} of {new}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_teacher_forcing(variant: str, omnis: Callable[[str], Omni]) -> None:
    omni = omnis(variant)
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


def test_a_row_does_not_depend_on_its_batch_mates(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    conversations, _ = PROMPTS["unequal rows"]
    conversations = [*conversations, PROMPTS["short audio"][0][0]]
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}):
        seeds = [3, 1, 4, 1, 5]
        together = omni.generate(conversations, max_new_tokens=20, seed=seeds, **settings)
        for conversation, seed, row in zip(conversations, seeds, together, strict=True):
            alone = omni.generate(conversation, max_new_tokens=20, seed=seed, **settings)
            assert alone.token_ids == row.token_ids


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
        logits = omni_jax.omni.forward(params, batch.token_ids, batch.position_ids, first, None, graph=omni.graph)
        return -jax.nn.log_softmax(logits[0, :-1])[
            np.arange(batch.token_ids.shape[1] - 1), batch.token_ids[0, 1:]
        ].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.abs(grads["layers"]["moe"]["down"]).max() > 0
    step = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    assert loss(step) < value
    assert omni.thinker.embed[...].shape == params["embed"].shape


def test_the_configuration_survives_a_round_trip(checkpoints: Callable[[str], Path]) -> None:
    for variant in VARIANTS:
        values = json.loads((checkpoints(variant) / "config.json").read_text())
        assert OmniConfig.from_hf(json.loads(json.dumps(values))) == OmniConfig.from_hf(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least one token"),
        ({"max_new_tokens": 10**6}, "context of"),
        ({"stop_ids": [10**6]}, "outside the vocabulary"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seeds for 1"),
        ({"temperature": float("nan")}, "temperature"),
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
