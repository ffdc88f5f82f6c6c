"""A row says what it says alone, whoever speaks beside it and however its text comes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_hf
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import Request, requests_for, row_keys
from omni_jax.decode.rows import idle, insert
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import Speaker, SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.talker_loop import decode_frames, prefill_talker
from omni_jax.decode.speech.vocode import Vocoder, vocode, vocode_chunk
from omni_jax.inputs.processor import Processor
from omni_jax.omni import Omni
from omni_jax.settings import Voice
from omni_jax.sharding import make_mesh
from tests.parity import audio_part, image_part, user

DRAWN = Voice()
GREEDY = Voice(speech_temperature=0.0, speech_repetition_penalty=1.0)


@dataclasses.dataclass
class Line:
    """What one row is to say: a conversation, its speaker, the tokens of the reply, its seed and its most frames."""

    messages: list[dict]
    speaker: str
    ids: list[int]
    seed: int
    max_frames: int


@dataclasses.dataclass
class Words:
    """A text of which `shown` tokens are written."""

    ids: list[int]
    key: jax.Array
    shown: int = 0
    done: bool = False

    @property
    def spoken(self) -> list[int]:
        return self.ids[: self.shown]

    def write(self, tokens: int) -> None:
        """Write some more; the reply is finished when there is nothing more to write."""
        self.done = self.shown == len(self.ids)
        self.shown = min(self.shown + tokens, len(self.ids))


LINES = [
    Line(user("Just words."), "ethan", [11, 12, 13, 14, 15, 16, 17], 3, 30),
    Line(user(image_part(90, 90, 5), "A picture."), "vera", [21, 22], 4, 17),
    Line(user("Nothing."), "vera", [], 5, 9),
    Line(user("Why?"), "ethan", [31], 6, 1),
    Line(user(audio_part(1.2, 5), "Heard."), "vera", list(range(40, 80)), 7, 25),
    Line(user("Words and words again."), "vera", [51, 52, 53], 3, 33),
]


@pytest.fixture(scope="module")
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("small")


def pool(omni: Omni, rows: int, voice: Voice = DRAWN) -> Speakers:
    parts = (omni.params["talker"], omni.declarations["talker"], lambda: omni.params["thinker"]["embed"])
    return Speakers(*parts, omni.config, voice, rows)


def asked(omni: Omni, line: Line) -> tuple[SpeechRequest, Words, jax.Array | None]:
    """What `insert` takes for a line, of which nothing is written yet; the Thinker's states are any numbers."""
    request = SpeechRequest.read(
        omni.prepare(line.messages), Voice(line.speaker, max_frames=line.max_frames), omni.config
    )
    shape = (1, 128, omni.config.thinker.text.hidden_size)
    hidden = np.random.default_rng(line.seed).standard_normal(shape, np.float32)
    return request, Words(line.ids, row_keys(line.seed, 1)[0]), jnp.asarray(hidden) if request.has_media else None


def alone(omni: Omni, line: Line, voice: Voice = DRAWN) -> np.ndarray:
    """The codes of a line that is said alone, all of it written before."""
    request, words, hidden = asked(omni, line)
    words.shown, words.done = len(line.ids), True
    speakers = pool(omni, 1, voice)
    speaker = speakers.insert(0, request, words, hidden)
    while not speaker.done:
        speakers.advance()
    return speaker.codes


def mixed(omni: Omni, lines: list[Line], rows: int, seed: int) -> tuple[dict[int, Speaker], int]:
    """The speakers of lines that come, write, pause and are given up at random, and how many were given up."""
    rng, speakers = np.random.default_rng(seed), pool(omni, rows)
    waiting, running, said, given_up = list(rng.permutation(len(lines))), {}, {}, 0
    while waiting or running:
        for b in range(rows):
            if b not in running and waiting and rng.random() < 0.5:
                i = waiting.pop(0)
                request, words, hidden = asked(omni, lines[i])
                running[b] = i, words, speakers.insert(b, request, words, hidden)
        for _, words, _ in running.values():
            words.write(int(rng.integers(0, 9)))
        before = {b: speaker.made for b, (_, _, speaker) in running.items()}
        new = speakers.advance(int(rng.integers(1, 33)))
        for b, (i, _, speaker) in list(running.items()):
            assert new[b].shape[1] == speaker.made - before[b]
            if speaker.done:
                said[i] = speaker
            elif rng.random() < 0.1:
                given_up += 1
                waiting.append(i)
            else:
                continue
            del running[b]
            speakers.free(b)
    return said, given_up


def test_any_mixture_says_what_each_row_says_alone(omni: Omni) -> None:
    want = [alone(omni, line) for line in LINES]
    assert [codes.shape[1] for codes in want] == [30, 17, 0, 1, 25, 33]
    programs, given_up = (prefill_talker, decode_frames, insert, idle), 0
    sizes: list[list[int]] = []
    for seed in range(6):
        said, more = mixed(omni, LINES, 3, seed)
        given_up += more
        for i, codes in enumerate(want):
            np.testing.assert_array_equal(said[i].codes, codes)
            assert said[i].cut == (codes.shape[1] > 0)
        sizes.append([program._cache_size() for program in programs])
    assert given_up > 2 and sizes[1:] == sizes[:-1], "nothing compiles for another mixture"


def test_a_row_that_begins_shortens_few_steps_of_another(omni: Omni) -> None:
    """Two steps more for the same frames, once for each row that begins; both go on at full length then."""
    speakers = pool(omni, 2)
    old, new = asked(omni, LINES[0]), asked(omni, LINES[5])
    first = speakers.insert(0, *old)
    old[1].write(9), old[1].write(9), new[1].write(9), new[1].write(9)
    while first.made < 8:
        speakers.advance(4, 1)
    second = speakers.insert(1, *new)
    steps = [[codes.shape[1] for codes in speakers.advance(4, 1)] for _ in range(5)]
    assert steps == [[n, n] for n in (1, 1, 2, 4, 4)]
    while not speakers.done:
        speakers.advance(4, 1)
    for speaker, line in ((first, LINES[0]), (second, LINES[5])):
        np.testing.assert_array_equal(speaker.codes, alone(omni, line))


def test_a_row_that_waits_for_its_text_holds_up_no_other(omni: Omni) -> None:
    speakers = pool(omni, 2)
    slow, fast = (asked(omni, LINES[i]) for i in (0, 5))
    first, second = speakers.insert(0, *slow), speakers.insert(1, *fast)
    assert [codes.shape[1] for codes in speakers.advance()] == [0, 0], "no first token is known"
    slow[1].write(1), fast[1].write(9)
    assert [codes.shape[1] for codes in speakers.advance()] == [0, 2], "one frame less than tokens, until all are there"
    slow[1].write(2), fast[1].write(9)
    assert [codes.shape[1] for codes in speakers.advance(20)] == [2, 20]
    while not speakers.done:
        slow[1].write(3)
        speakers.advance()
    for speaker, line in ((first, LINES[0]), (second, LINES[5])):
        np.testing.assert_array_equal(speaker.codes, alone(omni, line))


def test_a_row_that_pauses_stays_what_it_is(omni: Omni) -> None:
    # Whatever is drawn twice would be something else the second time.
    speakers = pool(omni, 2, Voice(speech_temperature=0.0, speech_repetition_penalty=10.0))
    for b in (0, 1):
        request, words, hidden = asked(omni, LINES[5 * b])
        words.write(9)
        speakers.insert(b, request, words, hidden)
    speakers.advance()
    before = jax.device_get(jax.tree.map(jnp.copy, speakers.state))
    args = (np.zeros((2, 32), np.int32), np.asarray([0, 4], np.int32), speakers.voices.values)
    static = {"declaration": speakers.declaration, "plan": speakers.voices.plan}
    frames, after = decode_frames(speakers.params, speakers.embed(), speakers.state, *args, **static)
    codes, after = np.asarray(frames.codes), jax.device_get(after)
    assert (codes[0] < 0).all() and (codes[1, :, :4] >= 0).all() and (codes[1, :, 4:] < 0).all()
    names = ("token", "done", "remaining", "seen")
    for was, now in [
        (before.hidden, after.hidden), (before.frames, after.frames), (before.cache.length, after.cache.length),
        *((getattr(before.rows, name), getattr(after.rows, name)) for name in names),
    ]:  # fmt: skip
        np.testing.assert_array_equal(now[0], was[0])
    assert after.frames[1] == before.frames[1] + 4 and after.cache.length[1] == before.cache.length[1] + 4
    assert (after.hidden[1] != before.hidden[1]).any() and after.rows.seen[1].sum() > before.rows.seen[1].sum()


def test_rows_that_come_together(omni: Omni) -> None:
    """Their prompts run as one batch, once all first tokens are known; each then goes on by itself."""
    lines = [LINES[i] for i in (0, 2, 3, 5)]
    batch = omni.prepare([line.messages for line in lines])
    request = SpeechRequest.read(batch, Voice([line.speaker for line in lines], max_frames=30), omni.config)
    texts, speakers = [asked(omni, line)[1] for line in lines], pool(omni, 4)
    rows = speakers.fill(request, texts)
    for text in texts[:3]:
        text.write(9)
    assert not any(codes.size for codes in speakers.advance()) and not any(row.running for row in rows)
    texts[1].write(1)
    texts[3].write(2)
    assert [codes.shape[1] for codes in speakers.advance()] == [6, 0, 0, 1]
    speakers.free(2)
    while not speakers.done:
        for text in texts:
            text.write(4)
        speakers.advance()
    for row, line in zip(rows, lines, strict=True):
        want = alone(omni, dataclasses.replace(line, max_frames=30 if line.ids else 1))
        np.testing.assert_array_equal(row.codes, want[:, : row.made])
    assert [row.made for row in rows] == [30, 0, 0, 30] and rows[2].done
    # The place of one that was given up is free, and so are all when they are done.
    again = speakers.insert(2, *asked(omni, LINES[3]))
    with pytest.raises(AssertionError, match="taken"):
        speakers.insert(2, *asked(omni, LINES[3]))
    again.text.write(1), again.text.write(1)
    speakers.advance()
    np.testing.assert_array_equal(again.codes, alone(omni, LINES[3]))


def test_a_row_that_is_given_up_before_it_speaks(omni: Omni) -> None:
    speakers = pool(omni, 2)
    never = speakers.insert(0, *asked(omni, LINES[4]))
    speakers.free(0)
    speakers.free(1)
    assert never.done and speakers.done and not speakers._waiting, "its hidden states are let go"
    instead = speakers.insert(0, *asked(omni, LINES[3]))
    instead.text.write(1), instead.text.write(1)
    speakers.advance()
    np.testing.assert_array_equal(instead.codes, alone(omni, LINES[3]))
    assert never.made == 0 and never.codes.shape == (5, 0)


def test_rows_end_by_themselves_and_a_cache_grows_with_the_longest(omni: Omni) -> None:
    assert omni.config.talker is not None
    eos, head, greedy = omni.config.talker.codec_eos_id, omni.params["talker"]["codec_head"], GREEDY
    code = int(alone(omni, LINES[0], greedy)[0, 12])
    talker = {**omni.params["talker"], "codec_head": head.at[eos].set(1.2 * head[code])}
    ending = Omni({**omni.params, "talker": talker}, omni.config, omni.processor)
    ending.declarations = omni.declarations
    lines = [dataclasses.replace(line, max_frames=260) for line in LINES[:2]]
    lines += [dataclasses.replace(LINES[5], messages=user("word " * 57))]
    want = [alone(ending, line, greedy) for line in lines]
    speakers = pool(ending, 2, greedy)
    rows = [speakers.insert(b, *asked(ending, lines[b])) for b in (0, 1)]
    while not (rows[0].done or rows[1].done):
        for row in rows:
            row.text.write(30)
        speakers.advance()
    b = 0 if rows[0].done else 1
    speakers.free(b)
    rows.append(speakers.insert(b, *asked(ending, lines[2])))
    rows[2].text.write(30)
    while not speakers.done:
        for row in rows:
            row.text.write(30)
        speakers.advance()
        assert speakers.state is not None
        assert all(row.columns + row.made <= speakers.state.cache.capacity for row in rows)
    for row, codes in zip(rows, want, strict=True):
        np.testing.assert_array_equal(row.codes, codes)
    assert rows[2].columns < 256 < rows[2].columns + rows[2].made, "its cache grew"
    assert min(row.made for row in rows) < 30 and not all(row.cut for row in rows), "some end themselves"


def test_replies_that_are_written_at_different_times(omni: Omni) -> None:
    """Text, codes and sound are those of `generate`, and sound that is streamed is that of the whole."""
    assert omni.config.talker is not None and omni.config.code2wav is not None
    layer, settings = omni.config.talker.accept_hidden_layer, {"max_new_tokens": 20, "stop_ids": (), "max_frames": 24}
    spoken = [(line.messages, line.speaker, line.seed) for line in (LINES[1], LINES[0], LINES[4], LINES[5])]
    want = [omni.generate(m, speaker=who, seed=seed, speech=True, **settings) for m, who, seed in spoken]
    speakers, waiting, running, compiled = pool(omni, 2), list(enumerate(spoken)), {}, set()
    vocoder = (omni.params["code2wav"], omni.declarations["code2wav"], omni.config.code2wav)
    while waiting or running:
        for b in (0, 1):
            if b not in running and waiting:
                i, (messages, who, seed) = waiting.pop(0)
                batch = omni.prepare(messages)
                request = SpeechRequest.read(batch, Voice(who, max_frames=24), omni.config)
                thinker = (omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text)
                engine, (text,) = PlainEngine(*thinker, Sampling()), requests_for(batch, Limits(20), [seed])
                chunks = Batching(engine, 1, Admission(batch, [text]), steps=3 + i).run()
                next(chunks)
                again = engine.prefill(
                    batch, requests_for(batch, Limits(20), [seed]), (layer,) if request.has_media else ()
                )
                speaker = speakers.insert(b, request, text, None if again.tapped is None else again.tapped[0])
                running[b] = Running(i, text, chunks, speaker, Vocoder(*vocoder))
        for one in running.values():
            next(one.chunks, None)
        for b, codes in enumerate(speakers.advance(5)):
            if b in running:
                running[b].waves.append(running[b].vocoder.add(codes))
        for b, one in list(running.items()):
            if one.speaker.done:
                speakers.free(b)
                del running[b]
                reply = want[one.number]
                assert one.text.token_ids == reply.token_ids
                np.testing.assert_array_equal(one.speaker.codes, reply.codes)
                (whole,) = vocode(*vocoder, one.speaker.codes[None])
                np.testing.assert_array_equal(whole, reply.audio)
                one.waves.append(one.vocoder.finish())
                np.testing.assert_array_equal(np.concatenate(one.waves), reply.audio)
                compiled.add(vocode_chunk._cache_size())
    assert len(compiled) == 1, "the sound of rows compiles once"


@dataclasses.dataclass
class Running:
    """A reply that is being written, said and heard."""

    number: int
    text: Request
    chunks: Any
    speaker: Speaker
    vocoder: Vocoder
    waves: list[np.ndarray] = dataclasses.field(default_factory=list)


def test_rows_on_a_mesh_say_what_they_say_on_one_device(
    omnis: Callable[[str], Omni], checkpoints: Callable[[str], Path]
) -> None:
    mesh = make_mesh(jax.devices()[:4], data=2, expert=2)
    params, config = load_hf(checkpoints("tiny"), mesh=mesh)
    spread = Omni(params, config, Processor.from_dir(checkpoints("tiny"), config), mesh)
    lines = [dataclasses.replace(LINES[i], speaker="ethan", max_frames=6) for i in (0, 1, 5)]
    want = [alone(omnis("tiny"), line) for line in lines]
    said, _ = mixed(spread, lines, 2, 0)
    for i, codes in enumerate(want):
        np.testing.assert_array_equal(said[i].codes, codes)


def test_a_row_of_its_own_device_that_pauses_at_the_capacity_keeps_its_last_column(
    omnis: Callable[[str], Omni], checkpoints: Callable[[str], Path]
) -> None:
    """With one row on each device, what it writes past its capacity would land on its last column instead."""
    mesh = make_mesh(jax.devices()[:2], data=2)
    params, config = load_hf(checkpoints("tiny"), mesh=mesh)
    spread = Omni(params, config, Processor.from_dir(checkpoints("tiny"), config), mesh)
    lines = [Line(user("word " * words), "ethan", [*range(20, 90)], 3, 60) for words in (57, 1)]
    speakers = pool(spread, 2)
    (_, words, _), *_ = given = [asked(spread, line) for line in lines]
    pausing, going = (speakers.insert(b, *row) for b, row in enumerate(given))
    words.shown = 1 + 256 - pausing.columns
    speakers.advance()
    assert speakers.state is not None and pausing.columns + pausing.made == 256
    given[1][1].shown = 20
    speakers.advance()
    assert going.made == 19
    words.shown = 60
    speakers.advance()
    np.testing.assert_array_equal(pausing.codes, alone(omnis("tiny"), lines[0])[:, : pausing.made])
