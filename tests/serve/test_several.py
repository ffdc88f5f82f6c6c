"""A server of several real processes that hold one model together: it answers what one process answers."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from omni_jax import distributed
from omni_jax.serve.sounds import pcm16
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


def test_one_process_gives_its_own_value() -> None:
    for value in ([], {"a": np.arange(5)}, bytes(10_000)):
        assert str(distributed.value_from_first(value)) == str(value)
