"""A server of several real processes that hold one model together: it answers what one process answers."""

import asyncio
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from omni_jax import distributed
from omni_jax.decode.answers import Follower
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.process import FAILED
from omni_jax.serve import engine
from omni_jax.serve.engine import Service
from omni_jax.serve.running import Running
from omni_jax.serve.sounds import pcm16
from omni_jax.serve.tickets import Ticket
from omni_jax.settings import Voice
from tests.helpers.processes import ENVIRONMENT, ROOT, flags
from tests.helpers.serving import server

openai = pytest.importorskip("openai")
TEXT = [{"role": "user", "content": "What do you hear in the garden?"}]


@pytest.mark.slow
def test_two_processes_serve_what_one_answers(checkpoints, omnis) -> None:
    first, second = flags(2)
    asked = ("--slots", "2", "--dtype", "float32", "--mesh", "expert=2")
    command = [sys.executable, "-m", "omni_jax", "serve", "--model", str(checkpoints("tiny")), *asked, *second]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT, text=True)
    try:
        with server(checkpoints("tiny"), *asked, *first, env=ENVIRONMENT) as served:
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300)
            _check(client, omnis("tiny"))
            other.send_signal(signal.SIGTERM)  # as a scheduler sends it to all
        assert other.wait(60) == 0, other.communicate()[1][-3000:]
    finally:
        other.kill()
        other.communicate()


def _check(client, omni) -> None:
    """Replies side by side, one of them spoken, one given up, and a text that is read aloud."""

    def ask(seed, **more):
        return client.chat.completions.create(
            model="tiny", messages=TEXT, max_tokens=12, seed=seed, temperature=1, **more
        )

    spoken = {"modalities": ["text", "audio"], "extra_body": {"max_frames": 6}, "audio": {"format": "pcm16"}}
    with ThreadPoolExecutor(4) as pool:
        given_up = pool.submit(lambda: next(iter(ask(0, stream=True))))
        found = [*pool.map(lambda seed: ask(seed, **(spoken if seed == 2 else {})), (1, 2, 3))]
        given_up.result()
    for seed, completion in zip((1, 2, 3), found, strict=True):
        more = {"speech": True, "max_frames": 6} if seed == 2 else {}
        reply = omni.generate(TEXT, max_new_tokens=12, seed=seed, temperature=1.0, **more)
        assert completion.choices[0].message.content == reply.text
    sound = client.audio.speech.create(
        model="tiny",
        voice="ethan",
        input="A red house.",
        response_format="pcm",
        extra_body={"max_frames": 5, "seed": 4},
    )
    said = omni.speak("A red house.", voice=Voice("ethan", max_frames=5), seed=4)
    ours, theirs = (np.frombuffer(data, "<i2") for data in (sound.content, pcm16(said.audio)))
    # Experts on two devices are summed in another order.
    np.testing.assert_allclose(ours, theirs, atol=2)


def test_all_processes_have_the_same_wait(omnis, monkeypatch) -> None:
    """Texts wait for rows of their own, and clients that have gone for nothing, which only the first process sees."""
    told = []
    monkeypatch.setattr(engine, "value_from_first", lambda news: told.pop() if told else told.append(news) or news)
    running = Running(omnis("tiny"), 1)
    first, second = services = Service(running), Service(running)
    first._several = second._several = True
    second._first = False
    prompt, said = Prompt(omnis("tiny").prepare(TEXT), 0, 4, speech=False), running.said("A", Voice(), 0)
    asked = [Ticket(None, prompt), Ticket(None, said=said), Ticket(None, prompt)]
    for ticket in asked:
        first._tickets.put(ticket)

    def agree() -> list[tuple]:
        for service in services:
            service._agree(wait=False)
        return [([*map(service._known.index, service._again)], service._readings.busy) for service in services]

    assert agree() == 2 * [([0, 2], True)]
    asked[0].left = True
    assert agree() == 2 * [([2], True)] and [ticket.ended for ticket in second._known] == [True, False, False]
    # One that has ended is known no more.
    assert agree() == 2 * [([1], True)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("place", [(Speakers, "advance"), (Follower, "_vocode")], ids=["aloud", "reply"])
def test_of_several_processes_the_one_that_fails_ends(omnis, monkeypatch, place):
    """Whether a text that is read aloud fails, or the sound of a reply: the others wait for it in a collective."""
    omni, failed, ended = omnis("tiny"), [], []

    def failing(*_):
        failed.append(True)
        raise ValueError("deaf")

    def leave(status):
        ended.append(status)
        raise SystemExit

    async def work():
        service, asked = Service(Running(omni, 1)), omni.prepare(TEXT)
        service._several = service._readings._several = True
        service.start()
        await _all(service.answer(Prompt(asked, 0, 2, speech=False)))
        monkeypatch.setattr(*place, failing)
        if place[0] is Speakers:
            events = service.read_aloud(service.running.said("A", Voice(max_frames=6), 0))
        else:
            events = service.answer(Prompt(asked, 0, 4, speech=True))
        asking = asyncio.create_task(_all(events))
        await asyncio.to_thread(service._thread.join, 120)
        asking.cancel()
        return service._thread.is_alive()

    monkeypatch.setattr(engine.os, "_exit", leave)
    assert not asyncio.run(work()) and ended == [FAILED] and failed == [True]


async def _all(events):
    return [event async for event in events]


def test_one_process_gives_its_own_value() -> None:
    for value in ([], {"a": np.arange(5)}, bytes(10_000)):
        assert str(distributed.value_from_first(value)) == str(value)
