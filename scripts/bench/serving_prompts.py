"""The requests of a run: prompts of a dataset or short questions, mixed with made media and with speech.

The warm-up asks the same prompts with another first letter: they are as long, so that the same programs are compiled,
but a server that keeps what it has seen finds little. For the same reason every made medium is another one. The media
of a dataset's own rows are the exception: the warm-up shows them too.
"""

import base64
import io
import mimetypes
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.evaluate.data import read_dataset
from omni_jax.inputs.messages import KINDS, URLS
from omni_jax.inputs.source import scheme_of
from scripts.bench.options import Serve

MIXED = ("text", *KINDS, "speech")
QUESTIONS = (
    "How does a kettle boil water?", "Write a short poem about the sea.", "What is two thirds of ninety?",
    "Explain in simple words why the sky is blue.", "Name five animals that live in a forest, and what they eat.",
    "Write a letter to a friend who has moved to another town.", "What makes a good morning?",
    "Plan a day in a city that you know, hour by hour.",
)  # fmt: skip
UNKNOWN_TYPE = "application/octet-stream"
IMAGE_SIDE, SOUND_SECONDS, SOUND_RATE = 256, 3, 16_000  # of made media
VIDEO_WIDTH, VIDEO_HEIGHT, VIDEO_FRAMES, VIDEO_RATE = 128, 96, 16, 8


@dataclass(frozen=True)
class Question:
    """A request. kind: one of `MIXED`. messages: in OpenAI's form, media as data: URLs."""

    number: int
    kind: str
    messages: list[dict[str, Any]]

    def body(self, options: Serve, model: str) -> dict[str, Any]:
        """The JSON body that asks for the reply as a stream."""
        body: dict[str, Any] = {"model": model, "messages": self.messages, "max_tokens": options.new}
        body |= {"temperature": options.temperature, "seed": options.seed + self.number, "stream": True}
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if options.ignore_eos:
            body["ignore_eos"] = True
        if self.kind == "speech":
            body |= {"modalities": ["text", "audio"], "audio": {"format": "pcm16"}}
            body |= {} if options.frames is None else {"max_frames": options.frames}
        return body


def make_questions(options: Serve) -> tuple[list[Question], list[Question]]:
    """The requests of the warm-up, and those that are measured; InputError for prompts or a mix that cannot be used."""
    if options.prompts is None:
        chats = [[_user(f"{i + 1}. {QUESTIONS[i % len(QUESTIONS)]}")] for i in range(options.count)]
    else:
        data = read_dataset(options.prompts, limit=options.count)
        if data.problems:
            raise InputError(f"{data.problems[0].where}: {data.problems[0].why}")
        chats = [[_sendable(message) for message in sample.messages] for sample in data.samples]
    kinds = mixed(options.mix, len(chats), options.seed)
    measured = [Question(i, kind, _with_medium(chats[i], kind, i)) for i, kind in enumerate(kinds)]
    warm_up = []
    # The kinds in turn, so that a few requests show all of them.
    in_turn = mixed(options.mix, options.warm_up, None)
    for i, kind in enumerate(in_turn):
        number = len(chats) + i
        warm_up.append(Question(number, kind, _with_medium(_altered(chats[i % len(chats)]), kind, number)))
    return warm_up, measured


def mixed(mix: str, count: int, seed: int | None) -> list[str]:
    """The kind of each of `count` requests, by the weights of "text=4,image=1"; in turn, or shuffled with a seed."""
    weights: dict[str, int] = {}
    for part in mix.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in MIXED or name in weights or not (weight or "1").isdecimal() or int(weight or "1") < 1:
            raise InputError(f"mix is {mix!r}; give kinds out of {', '.join(MIXED)} with weights, as in text=4,image=1")
        weights[name] = int(weight or "1")
    # One of each kind first, then one of each that has more left.
    cycle = [name for turn in range(max(weights.values())) for name in weights if weights[name] > turn]
    kinds = [cycle[i % len(cycle)] for i in range(count)]
    return kinds if seed is None else [str(kind) for kind in np.random.default_rng(seed).permutation(kinds)]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _parts(content: Any) -> list[Any]:
    """The content of a message as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _altered(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation of the same length, the first letter of whose first text has the other case."""
    altered = [message | {"content": _parts(message["content"])} for message in chat]
    texts = (
        (message, i) for message in altered for i, part in enumerate(message["content"]) if part.get("type") == "text"
    )
    message, i = next(texts, (None, 0))
    if message is not None:
        text = message["content"][i]["text"]
        at = next((at for at, letter in enumerate(text) if letter.isalpha()), 0)
        text = text[:at] + text[at : at + 1].swapcase() + text[at + 1 :]
        message["content"][i] = {"type": "text", "text": text}
    return altered


def _with_medium(chat: list[dict[str, Any]], kind: str, seed: int) -> list[dict[str, Any]]:
    """The same conversation, with a made medium at the beginning of its last message if the kind is one."""
    if kind not in KINDS:
        return chat
    make = {"image": made_image, "audio": made_sound, "video": made_video}[kind]
    *before, last = chat
    return [*before, last | {"content": [_part_of(kind, make(seed)), *_parts(last["content"])]}]


def _part_of(kind: str, address: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def _sendable(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose media are URLs: the files that it names are put into it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": [_sendable_part(part) if isinstance(part, dict) else part for part in content]}


def _sendable_part(part: dict[str, Any]) -> dict[str, Any]:
    form = part.get("type")
    if form not in (*KINDS, *URLS):
        return part
    source = part.get(form)
    source = source.get("url") if isinstance(source, dict) else source
    kind = form.removesuffix("_url")
    if isinstance(source, bytes):
        return _part_of(kind, _data_url(source, UNKNOWN_TYPE))
    if not isinstance(source, str):
        raise InputError(f"a {kind} of type {type(source).__name__}; name a file, or write a data: URL")
    if scheme_of(source) in ("data", "http", "https"):
        return _part_of(kind, source)
    return _part_of(kind, _data_url(Path(source).read_bytes(), mimetypes.guess_type(source)[0] or UNKNOWN_TYPE))


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def made_image(seed: int) -> str:
    """A picture of coloured squares as a data: URL."""
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.NEAREST).save(file, "PNG")
    return _data_url(file.getvalue(), "image/png")


def made_sound(seed: int) -> str:
    """A WAV of noise as a data: URL."""
    samples = np.random.default_rng(seed).normal(0, 3000, SOUND_SECONDS * SOUND_RATE).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SOUND_RATE)
        out.writeframes(samples.tobytes())
    return _data_url(file.getvalue(), "audio/wav")


def made_video(seed: int) -> str:
    """An MP4 of coloured squares, without sound, as a data: URL."""
    import av

    rng, file = np.random.default_rng(seed), io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("mpeg4", rate=VIDEO_RATE)
        stream.width, stream.height, stream.pix_fmt = VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p"
        for _ in range(VIDEO_FRAMES):
            squares = rng.integers(0, 256, (VIDEO_HEIGHT // 32, VIDEO_WIDTH // 32, 3), np.uint8)
            picture = squares.repeat(32, axis=0).repeat(32, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return _data_url(file.getvalue(), "video/mp4")
