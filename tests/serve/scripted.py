"""A server with the routes that the page uses, whose answers are scripted by the words of the question.

It serves the page itself, records what was sent, and listens on a free port of this machine in a thread.
"""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.helpers.serving import listening

PAGE = Path(__file__).resolve().parents[2] / "omni_jax" / "serve" / "page.html"
WORDS = ("The ", "sea ", "is ", "blue. ", "So ", "is ", "the ", "sky.")
ANSWER = "".join(WORDS)
PIECE = 2400  # samples of one piece of sound: 0.1 s
ENDLESS = 1000  # words of an answer that is to be stopped


@dataclass
class Scripted:
    """What the server was asked, and how it answers from now on.

    asked: bodies of requests for answers. key: the API key that is required, if any. voices: those of the model. left:
    answers whose client went.
    """

    asked: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    voices: tuple[str, ...] = ("ethan", "chelsie", "aiden")
    left: int = 0
    address: str = ""

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/", lambda request: FileResponse(PAGE)),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "The API key is wrong.")

    async def _models(self, request: Request) -> Response:
        model = {"id": "scripted", "object": "model", "voices": self.voices}
        return self._refusal(request) or JSONResponse({"object": "list", "data": [model]})

    async def _answer(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.asked.append(body)
        words = _words(body["messages"][-1])
        if "busy" in words:
            return _error(429, "All places are taken.", {"Retry-After": "3"})
        spoken = "audio" in body["modalities"]
        return StreamingResponse(self._events(words, spoken), media_type="text/event-stream")

    async def _events(self, words: str, spoken: bool) -> AsyncIterator[str]:
        """The events of an answer; words in the question ("endless", "think") change its course."""
        try:
            yield ": hello\n\n"
            yield _event({"role": "assistant", "content": ""}, 0)
            said = WORDS * ENDLESS if "endless" in words else WORDS
            if "think" in words:
                yield _event({"reasoning_content": "Water, light."}, 0)
            for i, word in enumerate(said):
                if "aloud" not in words:
                    yield _event({"content": word}, i + 1)
                if spoken:
                    yield _event({"audio": {"id": "a", "data": _sound(), "transcript": word}}, i + 1)
                await asyncio.sleep(0.6 if "gap" in words and i == 3 else 0.02)
                if "fail" in words and i == 3:
                    yield f"data: {json.dumps({'error': {'message': 'Memory ran out.', 'type': 'server_error'}})}\n\n"
                    return
                if "cut" in words and i == 3:
                    return
            yield _event({}, len(said), "length" if "long" in words else "stop")
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


def _words(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _sound() -> str:
    wave = 8000 * np.sin(2 * np.pi * 440 * np.arange(PIECE) / 24000)
    return base64.b64encode(wave.astype("<i2").tobytes()).decode()


def _event(delta: dict[str, Any], tokens: int, reason: str | None = None) -> str:
    """One chunk; of each three tokens after the first, two were drafted."""
    details = {"accepted_prediction_tokens": (tokens - 1) * 2 // 3, "rejected_prediction_tokens": 1}
    chunk = {
        "object": "chat.completion.chunk",
        "modality": "audio" if "audio" in delta else "text",
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "completion_tokens_details": details},
    }
    return f"data: {json.dumps(chunk)}\n\n"


@contextlib.contextmanager
def serving() -> Iterator[Scripted]:
    """A running scripted server."""
    scripted = Scripted()
    with listening(scripted.app()) as scripted.address:
        yield scripted
