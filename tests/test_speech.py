"""Speech from prompt to waveform against transformers, and what spoken replies promise."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import Request
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.voice import RESIDUAL
from omni_jax.errors import InputError
from omni_jax.omni import Omni, Reply
from omni_jax.settings import Voice
from tests.helpers.prompts import PROMPTS
from tests.parity import audio_part, image_part, reference_inputs, user, video_part

WAVE_ATOL = 1e-3
NEW, FRAMES = 9, 20
GREEDY = {"speech": True, "speech_temperature": 0.0, "stop_ids": (), "max_new_tokens": NEW, "max_frames": FRAMES}


@dataclasses.dataclass
class Spoken:
    """What the reference says: token ids, codes [Q, frames] and waveform of each row."""

    token_ids: list[list[int]]
    codes: list[np.ndarray]
    audio: list[np.ndarray]


def reference_speech(
    model: Any, omni: Omni, conversations: list[list[dict]], speaker: str, hear: bool = False, padding: str = "right"
) -> Spoken:
    """The reference's greedy reply; the Talker is told of sound in video, which the reference forgets to do."""
    import torch

    assert omni.config.talker is not None
    batch = omni.prepare(conversations, use_audio_in_video=hear, padding=padding)
    recorded, generate = {}, model.talker.generate

    def record(*args: Any, **kwargs: Any) -> Any:
        recorded["out"] = generate(*args, **kwargs)
        return recorded["out"]

    model.talker.generate = record
    try:
        with torch.no_grad():
            ids, audio = model.generate(
                **reference_inputs(omni.processor, conversations, batch, hear), speaker=speaker,
                talker_use_audio_in_video=hear, thinker_eos_token_id=-1, thinker_max_new_tokens=NEW,
                thinker_pad_token_id=0, talker_max_new_tokens=FRAMES + 1, talker_do_sample=False,
            )  # fmt: skip
    finally:
        del model.talker.generate
    codes = torch.stack([h[-1] for h in recorded["out"].hidden_states if h[-1] is not None], dim=2).numpy()
    first = recorded["out"].sequences.numpy()
    eos, rows = omni.config.talker.codec_eos_id, []
    for row, said in zip(codes, first, strict=True):
        rows.append(row[:, : said.tolist().index(eos)] if eos in said else row)
    audio = [audio[0, 0]] if torch.is_tensor(audio) else audio
    return Spoken(ids[:, batch.token_ids.shape[1] :].tolist(), rows, [a.numpy().reshape(-1) for a in audio])


KINDS = ("text", "images", "audio", "video", "audio in video", "mixed")
CASES = [*((variant, kind) for variant in ("odd", "nano") for kind in KINDS), ("tiny", "mixed"), ("small", "mixed")]


@pytest.mark.parametrize("variant, prompt", CASES)
def test_greedy_speech_equals_the_reference(
    variant: str, prompt: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    omni, (conversations, hear) = omnis(variant), PROMPTS[prompt]
    assert omni.config.talker is not None
    # Both speakers in turn, over the prompts.
    speaker = omni.config.talker.speakers[list(PROMPTS).index(prompt) % 2][0]
    want = reference_speech(reference(variant), omni, conversations, speaker, hear)
    reply = omni.generate(conversations[0], use_audio_in_video=hear, speaker=speaker.upper(), **GREEDY)
    assert reply.token_ids == want.token_ids[0]
    assert reply.codes is not None and reply.codes.shape == want.codes[0].shape
    np.testing.assert_array_equal(reply.codes, want.codes[0])
    np.testing.assert_allclose(reply.audio, want.audio[0], atol=WAVE_ATOL, rtol=0)
    assert np.abs(want.audio[0]).max() > 0.1, "a scale at which the tolerance means something"
    frames = want.codes[0].shape[1]
    assert reply.stats["frames"] == frames and (variant == "nano" or frames == FRAMES)
    assert reply.stats["speech_finish_reason"] == ("length" if frames == FRAMES else "stop")


def test_speakers_differ(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("odd")
    said = [omni.generate(user("Who are you?"), speaker=name, **GREEDY).codes for name in ("ethan", "mo", "una")]
    assert not np.array_equal(said[0], said[1]) and not np.array_equal(said[1], said[2])


TURNS = [
    {"role": "system", "content": "You speak briefly."},
    user(image_part(70, 90, 4), "What is it?")[0],
    {"role": "assistant", "content": "A wave."},
    user(audio_part(1.1, 5), "And this?")[0],
]
ROWS = [user("Just words, rather more of them than in the others."), TURNS, user(video_part(4, 64, 64, 2.0, 6))]


def test_many_turns_equal_the_reference(omnis: Callable[[str], Omni], reference: Callable[[str], Any]) -> None:
    want = reference_speech(reference("small"), omnis("small"), [TURNS], "ethan")
    np.testing.assert_array_equal(omnis("small").generate(TURNS, **GREEDY).codes, want.codes[0])


@contextmanager
def ending_at(omni: Omni, model: Any, code: int) -> Iterator[Omni]:
    """Both models with an end mark that is a little likelier than `code` wherever that is likely."""
    import torch

    assert omni.config.talker is not None
    eos, head = omni.config.talker.codec_eos_id, omni.params["talker"]["codec_head"]
    talker = {**omni.params["talker"], "codec_head": head.at[eos].set(1.2 * head[code])}
    weight = model.talker.codec_head.weight
    kept = weight[eos].clone()
    with torch.no_grad():
        weight[eos] = 1.2 * weight[code]
    try:
        ending = Omni({**omni.params, "talker": talker}, omni.config, omni.processor)
        ending.declarations = omni.declarations  # what is compiled is used again
        yield ending
    finally:
        with torch.no_grad():
            weight[eos] = kept


@pytest.mark.parametrize("variant", ["odd"])
def test_rows_that_end_early_equal_the_reference_alone(
    variant: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    """In a batch the reference says more than alone (its rows get another text behind their end); ours do not."""
    omni, model = omnis(variant), reference(variant)
    codes = omni.generate(ROWS[1], **GREEDY).codes
    assert codes is not None
    with ending_at(omni, model, int(codes[0, 12])) as ending:
        replies = ending.generate(ROWS, **GREEDY)
        frames = [reply.stats["frames"] for reply in replies]
        assert len(set(frames)) > 1 and min(frames) < FRAMES
        for reply, row in zip(replies, ROWS, strict=True):
            want = reference_speech(model, ending, [row], "ethan")
            np.testing.assert_array_equal(reply.codes, want.codes[0])
            np.testing.assert_allclose(reply.audio, want.audio[0], atol=WAVE_ATOL, rtol=0)
            ended = reply.stats["frames"] < FRAMES
            assert reply.stats["speech_finish_reason"] == ("stop" if ended else "length")


def test_a_row_speaks_alike_alone_and_in_a_batch(omnis: Callable[[str], Omni]) -> None:
    omni, names = omnis("odd"), ["mo", "ethan", "una"]
    rows = [ROWS[0], user("Why?"), user("And then?")]
    drawn = {"speech": True, "temperature": 1.0, "max_new_tokens": 12, "max_frames": 14}
    together = omni.generate(rows, speaker=names, seed=[5, 6, 7], **drawn)
    for reply, row, name, seed in zip(together, rows, names, (5, 6, 7), strict=True):
        alone = omni.generate(row, speaker=name, seed=seed, **drawn)
        same(reply, alone)


def same(reply: Reply, other: Reply) -> None:
    """Equal text and codes, and sound within rounding."""
    assert reply.token_ids == other.token_ids
    np.testing.assert_array_equal(reply.codes, other.codes)
    np.testing.assert_allclose(reply.audio, other.audio, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stream_says_what_generate_says(temperature: float, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    settings = {"speech": True, "speech_temperature": temperature, "max_new_tokens": 30, "max_frames": 43, "seed": 3}
    want = omni.generate(TURNS, stop_ids=(), **settings)
    events = list(omni.stream(TURNS, stop_ids=(), **settings))
    reply = events[-1].reply
    assert reply is not None and reply.text == "".join(event.text for event in events)
    same(reply, want)
    pieces = [event.audio for event in events if event.audio is not None]
    np.testing.assert_array_equal(np.concatenate(pieces), reply.audio)
    assert len(pieces) > 5
    first_audio = next(i for i, event in enumerate(events) if event.audio is not None)
    last_text = max(i for i, event in enumerate(events) if event.token_ids)
    assert first_audio < last_text, "the first sound leaves while the Thinker still writes"


def test_a_closed_stream_leaves_nothing_behind(omnis: Callable[[str], Omni]) -> None:
    import threading

    omni, settings = omnis("small"), {"speech": True, "stop_ids": (), "max_new_tokens": 30, "max_frames": 12}
    before = omni.generate(user("Hello"), **settings)
    threads = threading.active_count()
    stream = omni.stream(user("Hello"), **settings)
    next(event for event in stream if event.audio is not None)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads and next(stream, None) is None
    same(omni.generate(user("Hello"), **settings), before)


@pytest.mark.parametrize("frames", [1, 7, 25, 300])
def test_codes_do_not_depend_on_the_chunks(frames: int, omnis: Callable[[str], Omni]) -> None:
    """With the Thinker far ahead, and a cache that grows on the way."""
    omni = omnis("small")
    config, text = omni.config, omni.config.thinker.text
    batch, thinker = omni.prepare(user("Hello")), omni.params["thinker"]
    request = Request(batch.token_ids.shape[1], Limits(300))
    engine = PlainEngine(thinker, omni.declarations["thinker"], text, Sampling())
    Batching(engine, 1, Admission(batch, [request])).finish()
    said = []
    for step in (32, frames):
        voice = Voice("vera", speech_repetition_penalty=1.0, max_frames=290)
        parts = (omni.params["talker"], omni.declarations["talker"], lambda: thinker["embed"], config)
        speakers = Speakers(*parts, voice, rows=1)
        speaker, lengths = speakers.insert(0, SpeechRequest.read(batch, voice, config), request), []
        while not speaker.done:
            lengths.append(speakers.advance(step)[0].shape[1])
        assert set(lengths[:-1]) <= {min(step, 32)} and sum(lengths) == speaker.codes.shape[1]
        said.append(speaker.codes)
    np.testing.assert_array_equal(*said)
    assert said[0].shape[1] == 290 and speakers.state is not None and speakers.state.cache.capacity == 512


@pytest.mark.parametrize("variant", ["odd"])
def test_rows_whose_texts_end_apart_speak_as_alone(
    variant: str, omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    """The reference in a batch lets a row that has ended hear its stop token, and says something else than alone."""
    import torch

    omni, model = omnis(variant), reference(variant)
    drawn = {"repetition_penalty": 1.3, "max_new_tokens": 16}
    greedy = {**drawn, "speech": True, "speech_temperature": 0.0, "max_frames": 20}
    free = omni.generate(ROWS, stop_ids=(), **drawn)
    stop_ids = [free[0].token_ids[4], free[1].token_ids[9]]
    together = omni.generate(ROWS, stop_ids=stop_ids, **greedy)
    lengths = [len(reply.token_ids) for reply in together]
    assert len(set(lengths)) > 1 and max(lengths) > 2
    for reply, row in zip(together, ROWS, strict=True):
        same(reply, omni.generate(row, stop_ids=stop_ids, **greedy))
    short = lengths.index(min(lengths))
    batch = omni.prepare([ROWS[short]])
    with torch.no_grad():
        _, audio = model.generate(
            **reference_inputs(omni.processor, [ROWS[short]], batch), speaker="ethan", thinker_max_new_tokens=16,
            thinker_eos_token_id=stop_ids, thinker_repetition_penalty=1.3, talker_max_new_tokens=21,
            talker_do_sample=False,
        )  # fmt: skip
    np.testing.assert_allclose(together[short].audio, audio[0, 0].numpy(), atol=WAVE_ATOL, rtol=0)


def test_one_frame_and_none(omnis: Callable[[str], Omni], reference: Callable[[str], Any]) -> None:
    omni = omnis("small")
    whole = omni.generate(TURNS, **GREEDY)
    one = omni.generate(TURNS, **{**GREEDY, "max_frames": 1})
    assert one.codes is not None and one.stats["speech_finish_reason"] == "length"
    np.testing.assert_array_equal(one.codes, whole.codes[:, :1])
    with ending_at(omni, reference("small"), int(whole.codes[0, 0])) as ending:
        none = ending.generate(TURNS, **GREEDY)
    assert none.codes is not None and none.codes.shape == (5, 0)
    assert none.stats["speech_finish_reason"] == "stop" and none.audio is not None and len(none.audio) == 0


def test_residual_codes_are_drawn_as_the_reference_draws_them(
    omnis: Callable[[str], Omni], reference: Callable[[str], Any]
) -> None:
    model, omni, asked = reference("small"), omnis("small"), {}

    def record(**kwargs: Any) -> None:
        asked.update(kwargs)
        raise InterruptedError

    model.talker.code_predictor.generate = record
    inputs = reference_inputs(omni.processor, [user("Hi")], omni.prepare([user("Hi")]))
    try:
        with pytest.raises(InterruptedError):
            model.generate(**inputs, speaker="vera", thinker_eos_token_id=-1, thinker_max_new_tokens=3)
    finally:
        del model.talker.code_predictor.generate
    kept = model.talker.code_predictor.generation_config
    assert asked["do_sample"] and RESIDUAL == Sampling(kept.temperature or 1.0, asked["top_k"], asked["top_p"])


def test_prompts_that_the_talker_cannot_hold(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    assert omni.config.talker is not None and omni.config.talker.text.max_position_embeddings == 1024
    long = user("word " * 240)
    columns = omni.prepare(long).token_ids.shape[1]
    for ask in (omni.generate, omni.stream):
        with pytest.raises(InputError, match="Talker's context of 1024"):
            ask(user("word " * 300), speech=True, max_new_tokens=4)
    both = omni.generate([long, user("Hi")], speech=True, max_new_tokens=3, stop_ids=(), max_frames=4096)
    frames = [reply.stats["frames"] for reply in both]
    assert columns < 1024 and frames[0] <= 1024 - columns and frames[0] < frames[1] <= 1024


def test_short_replies(omnis: Callable[[str], Omni], reference: Callable[[str], Any]) -> None:
    """A reply of which nothing is spoken gives silence of no length (the reference fails); one token is spoken."""
    omni, question = omnis("small"), user("Say it.")
    plain = omni.generate(question, max_new_tokens=2, stop_ids=())
    for settings in ({"max_new_tokens": 1, "stop_ids": ()}, {"stop_ids": plain.token_ids[:1]}):
        reply = omni.generate(question, speech=True, **settings)
        assert reply.codes is not None and reply.codes.shape == (5, 0) and reply.audio is not None
        assert reply.audio.dtype == np.float32 and reply.audio.shape == (0,)
        assert reply.stats["frames"] == 0 and reply.stats["speech_finish_reason"] == "stop"
        assert list(omni.stream(question, speech=True, **settings))[-1].reply.stats["frames"] == 0  # type: ignore
    import torch

    model, batch = reference("small"), omni.prepare(question)
    with torch.no_grad():
        _, audio = model.generate(
            **reference_inputs(omni.processor, [question], batch), speaker="ethan", thinker_eos_token_id=-1,
            thinker_max_new_tokens=2, talker_max_new_tokens=7, talker_do_sample=False,
        )  # fmt: skip
    reply = omni.generate(question, speech=True, max_new_tokens=2, stop_ids=(), speech_temperature=0.0, max_frames=6)
    np.testing.assert_allclose(reply.audio, audio[0, 0].numpy(), atol=WAVE_ATOL, rtol=0)
    # In a batch, a row without speech changes nothing in the others.
    both = omni.generate(
        [question, user("More?")], speech=True, max_new_tokens=5, max_frames=5, stop_ids=plain.token_ids[:1]
    )
    same(
        both[1], omni.generate(user("More?"), speech=True, max_new_tokens=5, max_frames=5, stop_ids=plain.token_ids[:1])
    )


def test_seeds_decide_what_is_said(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    said = [
        omni.generate(user("Sing."), speech=True, max_new_tokens=6, stop_ids=(), max_frames=6, seed=seed).codes
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(said[0], said[1])
    assert not np.array_equal(said[0], said[2])


def test_text_is_the_same_with_and_without_speech(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    drawn = {"temperature": 1.0, "seed": 11, "max_new_tokens": 10}
    silent = omni.generate(user("Sing."), **drawn)
    assert silent.audio is None and silent.codes is None
    assert omni.generate(user("Sing."), speech=True, max_frames=2, **drawn).token_ids == silent.token_ids


def test_what_cannot_be_spoken_is_said(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    for settings, message in (
        ({"speaker": "nobody"}, "nobody.*ethan.*vera"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"max_frames": 5.0}, "max_frames is 5.0; it must be a whole number"),
        ({"speech_temperature": -1.0}, "speech_temperature is -1.0"),
        ({"speech_repetition_penalty": 0.0}, "speech_repetition_penalty is 0"),
        ({"speaker": ["ethan", "vera"]}, "speaker"),
    ):
        with pytest.raises(InputError, match=message):
            omni.generate(user("Hi"), speech=True, **settings)
        with pytest.raises(InputError, match=message):
            omni.stream(user("Hi"), speech=True, **settings)
    text_only = Omni({"thinker": omni.params["thinker"]}, omni.config, omni.processor)
    with pytest.raises(InputError, match="without its talker and code2wav.*parts="):
        text_only.generate(user("Hi"), speech=True)
    with pytest.raises(InputError, match="without its code2wav"):
        text_only.vocode(np.zeros((5, 3), int))
    for codes, message in (
        (np.zeros((4, 3), int), r"shape \[4, 3\]; give \[Q, F\]"),
        (np.zeros((0, 5, 3), int), "no row"),
        ([[[0] * 3] * 5, [[0] * 2] * 5], "as many frames"),
        (np.full((5, 3), 999), r"codes\[0, 0\] is 999"),
    ):
        with pytest.raises(InputError, match=message):
            omni.vocode(codes)
