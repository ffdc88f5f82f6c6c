"""A client of OpenAI's chat API that times what it receives: requests at a rate, a limited number in flight.

It reads streams of any server of this model: text is `delta.content`, sound `delta.audio.data`, or, in vllm-omni,
`delta.content` of chunks whose `modality` is "audio". HTTP is spoken over plain sockets, without proxies, so that a
piece is timed when it arrives.
"""

import asyncio
import base64
import io
import json
import os
import time
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from omni_jax.errors import InputError
from omni_jax.models.code2wav import SAMPLES_PER_SECOND

SHOWN_LETTERS = 200  # of a server's message
READ_BYTES = 1 << 16
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Address:
    """Where a server listens, and its key. path: before /v1."""

    host: str
    port: int
    tls: bool = False
    path: str = ""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, url: str, key: str | None = None) -> "Address":
        """That of a URL, with or without /v1 at its end; InputError for one that names no server."""
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise InputError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if tls else 80), tls, path, key or os.environ.get("OMNI_JAX_API_KEY"))

    def head(self, method: str, path: str, size: int) -> bytes:
        """The head of a request with a JSON body of `size` bytes."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {size}"]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


@dataclass
class Answer:
    """What came of one request. Times are in seconds after the run began.

    kind: of the request. texts: when each piece of text came. counts: when, and the tokens so far, as the server counts
    them. sounds: when each piece of sound came, and its seconds. usage: the last one. finish: why the reply ended.
    failure: what went wrong, None if nothing did. detail: what the server said of it.
    """

    number: int
    kind: str
    sent: float = 0.0
    ended: float = 0.0
    texts: list[float] = field(default_factory=list)
    counts: list[tuple[float, int]] = field(default_factory=list)
    sounds: list[tuple[float, float]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish: str | None = None
    failure: str | None = None
    detail: str = ""

    def take(self, now: float, chunk: dict[str, Any]) -> None:
        """Take in a chunk of the stream that comes now."""
        self.ended = now
        if error := chunk.get("error"):
            self.fail("error in the stream", error)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text, sound = delta.get("content"), (delta.get("audio") or {}).get("data")
            if chunk.get("modality") == "audio" and not sound:
                text, sound = None, text
            if text or delta.get("reasoning_content") or delta.get("tool_calls"):
                self.texts.append(now)
            if sound:
                self.sounds.append((now, seconds_of(base64.b64decode(sound))))
            self.finish = choice.get("finish_reason") or self.finish
        if usage := chunk.get("usage"):
            self.usage = usage
            self.counts.append((now, text_tokens(usage)))

    def fail(self, what: str, error: Any = None) -> None:
        """Take note of a failure, and of what the server says of it."""
        told = error if isinstance(error, dict) else {"message": error or ""}
        self.failure = " ".join(str(part) for part in (what, told.get("code") or told.get("type")) if part)
        self.detail = str(told.get("message") or "")[:SHOWN_LETTERS]


def text_tokens(usage: dict[str, Any]) -> int:
    """The tokens of text in a reply: this server, as OpenAI's, counts frames of speech as tokens too."""
    details = usage.get("completion_tokens_details") or {}
    return usage["completion_tokens"] - (details.get("audio_tokens") or 0)


def seconds_of(data: bytes) -> float:
    """The length of a piece of sound: a WAV file, or else 16-bit samples at the rate of the model."""
    if data[:4] == b"RIFF":
        with wave.open(io.BytesIO(data)) as file:
            return file.getnframes() / file.getframerate()
    return len(data) / 2 / SAMPLES_PER_SECOND


def arrivals(count: int, rate: float | None, seed: int) -> np.ndarray:
    """When requests are sent, in seconds, float64 [count]: a Poisson process of `rate` per second, or all at once."""
    if rate is None:
        return np.zeros(count)
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps) - gaps[0]


async def ask_all(
    address: Address, bodies: Sequence[tuple[str, dict[str, Any]]], times: Sequence[float], most: int | None,
    timeout: float,
) -> list[Answer]:  # fmt: skip
    """Send requests, each a kind and a body, at their times but at most `most` in flight; their answers, in order."""
    limit, begin = asyncio.Semaphore(most or max(len(bodies), 1)), time.perf_counter()
    free = list[Connection]()

    def clock() -> float:
        return time.perf_counter() - begin

    async def one(answer: Answer, body: dict[str, Any]) -> None:
        await asyncio.sleep(times[answer.number] - clock())
        async with limit:
            await ask(address, body, answer, clock, timeout, free)

    answers = [Answer(number, kind) for number, (kind, _) in enumerate(bodies)]
    try:
        await asyncio.gather(*(one(answer, body) for answer, (_, body) in zip(answers, bodies, strict=True)))
    finally:
        for _, writer in free:
            writer.close()
    return answers


async def ask(
    address: Address,
    body: dict[str, Any],
    answer: Answer,
    clock: Callable[[], float],
    timeout: float,
    free: list[Connection],
) -> None:
    """Send one request and time its answer; free: as in `exchange`."""
    answer.sent = answer.ended = clock()
    asked = exchange(address, "POST", "/v1/chat/completions", body, free)
    try:
        async with asyncio.timeout(timeout), asked as (status, data):
            if status != 200:
                answer.fail(f"status {status}", _error_of(b"".join([piece async for piece in data])))
                return
            async for event in events(data):
                answer.take(clock(), event)
    except TimeoutError:
        answer.fail(f"no end within {timeout:g} s")
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.fail(f"connection lost: {type(error).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, wave.Error) as error:
        answer.fail("unreadable answer", f"{type(error).__name__}: {error}")
    if answer.failure is None and answer.finish is None:
        answer.fail("ended without a finish reason")


@asynccontextmanager
async def exchange(
    address: Address, method: str, path: str, body: Any = None, free: list[Connection] | None = None
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """Send a request: the status of the response, and its body as it comes.

    free: connections to use again, as clients do; this one is put there once the body has been read.
    """
    sent = b"" if body is None else json.dumps(body).encode()
    request, complete = address.head(method, path, len(sent)) + sent, False
    (reader, writer), head = await _begun(address, request, [] if free is None else free)
    try:
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip().lower() for name, _, value in fields}

        async def pieces() -> AsyncGenerator[bytes, None]:
            nonlocal complete
            async with aclosing(_body(reader, headers)) as data:
                async for piece in data:
                    yield piece
            complete = headers.get("connection") != "close"

        async with aclosing(pieces()) as found:
            yield int(first.split()[1]), found
    finally:
        if complete and free is not None:
            free.append((reader, writer))
        else:
            writer.close()


async def _begun(address: Address, request: bytes, free: list[Connection]) -> tuple[Connection, bytes]:
    """Send a request: the connection that it went over, and the head of the response.

    The server may close a free connection at any moment, also just now: what got no answer there goes over a new one.
    """
    while free:
        kept = free.pop()
        reader, writer = kept
        if reader.at_eof() or reader.exception() or writer.is_closing():
            writer.close()
            continue
        try:
            return kept, await _head(kept, request)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            if getattr(error, "partial", b""):
                raise
            break
    new = await asyncio.open_connection(address.host, address.port, ssl=address.tls or None)
    return new, await _head(new, request)


async def _head(connection: Connection, request: bytes) -> bytes:
    """Send a request over a connection, which is closed if that fails: the head of the response."""
    reader, writer = connection
    try:
        writer.write(request)
        await writer.drain()
        return await reader.readuntil(b"\r\n\r\n")
    except BaseException:
        writer.close()
        raise


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    """The body of a response, bytes as they come."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(READ_BYTES):
            yield piece


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events; comments and the end mark are passed over."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data and data != b"[DONE]":
                yield json.loads(data)


async def fetch(address: Address, path: str) -> tuple[int, bytes]:
    """The status and the body of what is at a path."""
    async with exchange(address, "GET", path) as (status, data):
        return status, b"".join([piece async for piece in data])


def _error_of(body: bytes) -> Any:
    """OpenAI's error object of a response, or its text."""
    try:
        return json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")
