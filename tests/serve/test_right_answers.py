"""The shipped model behind a real server process, asked by the openai package: where it knows the answer, it is right.

Rows are those of `tests/data/nano`, on which no stage was trained.
"""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omni_jax.inputs.audio import read_file
from scripts.nano.judging import is_right, words
from tests.helpers.serving import server

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

KINDS = {"image": "image/png", "audio": "audio/flac", "video": "video/mp4"}
# Of each file, how many rows are asked, and how many must be right.
ASKED = {"written": (5, 4), "scene": (5, 4), "digits": (5, 4), "when": (4, 3), "red": (8, 6)}


@pytest.fixture(scope="module")
def client():
    with server(Path("nano"), "--slots", "4") as found:
        yield openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, messages, **more):
    return client.chat.completions.create(model="nano", messages=messages, **{"max_tokens": 64, **more})


def rows(folder: Path, sense: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{sense}.jsonl").read_text().splitlines()]


def sent(folder: Path, message: dict) -> dict:
    """A message of a row as clients of OpenAI's API send it, options beside the medium."""
    parts = []
    for part in message["content"]:
        kind = part["type"]
        if kind == "text":
            parts.append(part)
            continue
        data = base64.b64encode((folder / part[kind]).read_bytes()).decode()
        options = {name: value for name, value in part.items() if name not in ("type", kind)}
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{KINDS[kind]};base64,{data}"}, **options})
    return {"role": "user", "content": parts}


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "nano" and sorted(model.model_extra["voices"]) == ["chelsie", "ethan"]


@pytest.mark.parametrize("sense", ASKED)
def test_media_at_once(client, data_dir, sense):
    number, least = ASKED[sense]
    asked = rows(data_dir / "nano", sense)[:number]
    messages = [[sent(data_dir / "nano", row["messages"][0])] for row in asked]
    with ThreadPoolExecutor(number) as pool:
        replies = list(pool.map(lambda one: ask(client, one).choices[0].message.content, messages))
    assert sum(is_right(row, reply) for row, reply in zip(asked, replies, strict=True)) >= least, replies


def test_sounds_are_written_down(client, data_dir):
    asked = rows(data_dir / "nano", "digits")[:5]
    sounds = [data_dir / "nano" / row["messages"][0]["content"][0]["audio"] for row in asked]
    write = client.audio.transcriptions.create
    found = [write(model="nano", file=sound, extra_body={"max_tokens": 64}).text for sound in sounds]
    assert sum(is_right(row, text) for row, text in zip(asked, found, strict=True)) >= 4, found
    assert write(model="nano", file=sounds[0], response_format="text").strip() == found[0]
    events = list(write(model="nano", file=sounds[0], stream=True))
    assert events[-1].text == found[0] == "".join(one.delta for one in events[:-1])


def test_what_cannot_be_answered_says_why(client):
    damaged = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="message 0, part 0") as caught:
        ask(client, [{"role": "user", "content": [damaged]}])
    assert caught.value.param == "messages"
    hello = [{"role": "user", "content": "Hello!"}]
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        ask(client, hello, max_tokens=10**6)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=hello)
    assert ask(client, hello).choices[0].message.content, "it goes on"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is two plus three?", "Two plus three is five."),
        ("How much is 6 plus 4?", "Six plus four is ten."),
        ("Count from one to five.", "One, two, three, four, five."),
        ("Please repeat: a yellow bird.", "A yellow bird."),
    ],
)
def test_text_whole_and_streamed(client, question, answer):
    messages = [{"role": "user", "content": question}]
    found = ask(client, messages, logprobs=True)
    assert words(found.choices[0].message.content) == words(answer) and found.choices[0].finish_reason == "stop"
    assert all(one.logprob > -2 for one in found.choices[0].logprobs.content)
    chunks = ask(client, messages, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == (
        found.choices[0].message.content
    )


def test_an_earlier_turn_is_remembered(client, data_dir):
    row = rows(data_dir / "nano", "written")[1]
    first = sent(data_dir / "nano", row["messages"][0])
    said = ask(client, [first]).choices[0].message.content
    turns = [first, {"role": "assistant", "content": said}, {"role": "user", "content": "What digit did I show you?"}]
    found = ask(client, turns)
    assert row["answer"] in words(found.choices[0].message.content)


def test_a_long_turn_is_kept(client):
    turns = [{"role": "user", "content": "Please repeat: a yellow bird. " * 12}]
    said = ask(client, turns)
    turns += [{"role": "assistant", "content": said.choices[0].message.content}, {"role": "user", "content": "Again."}]
    kept = ask(client, turns).usage.prompt_tokens_details.cached_tokens
    assert said.usage.prompt_tokens - 8 <= kept < said.usage.total_tokens


def test_what_is_written_is_said_whole_and_streamed(client):
    messages = [{"role": "user", "content": "Please repeat: a yellow bird."}]
    spoken = {"modalities": ["text", "audio"], "audio": {"voice": "ethan", "format": "wav"}, "seed": 3}
    message = ask(client, messages, **spoken).choices[0].message
    whole, pieces = base64.b64decode(message.audio.data), b""
    for chunk in ask(client, messages, stream=True, **spoken | {"audio": {"voice": "ethan", "format": "pcm16"}}):
        for choice in chunk.choices:
            pieces += base64.b64decode(choice.delta.audio.data) if choice.delta.audio else b""
    assert whole[44:] == pieces and words(message.audio.transcript) == ["a", "yellow", "bird"]
    aloud = client.audio.speech.create(model="nano", input="Seven, two.", voice="chelsie", response_format="wav").read()
    for sound in (whole, aloud):
        samples, rate = read_file(sound)
        assert rate == 24_000 and samples.size > 0.3 * rate and abs(samples).max() > 0.05
    heard = {"type": "input_audio", "input_audio": {"data": base64.b64encode(aloud).decode(), "format": "wav"}}
    question = {"type": "text", "text": "Which digits are spoken?"}
    found = ask(client, [{"role": "user", "content": [heard, question]}]).choices[0].message.content
    assert words(found) == ["seven", "two"], "what it says, it hears"
