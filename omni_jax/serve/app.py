"""The routes of the server, and nothing else: each reads its request, has `Serving` do the work, and sends the answer.

POST /v1/chat/completions, /v1/audio/transcriptions, /v1/audio/speech; GET /, which is the page, /v1/models,
/v1/models/NAME, /health, /metrics. Errors are OpenAI's objects everywhere. Of a client that goes away, the work is
stopped.
"""

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from omni_jax.errors import InputError
from omni_jax.files import parse_json
from omni_jax.serve import sounds
from omni_jax.serve.answered import model_body, sse
from omni_jax.serve.asked import check_model, read_chat
from omni_jax.serve.asked_audio import AskedSpeech, AskedTranscript, read_speech, read_transcription
from omni_jax.serve.doors import Doors
from omni_jax.serve.errors import RequestError, invalid, told
from omni_jax.serve.guard import App, Bounds, Guard
from omni_jax.serve.serving import Serving

T = TypeVar("T")
P = TypeVar("P", str, bytes)
PAGE = Path(__file__).with_name("page.html")
GONE = 499  # the status of requests whose clients have left, which nobody reads
_JSON = ("", "application/json", "text/json")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_MOST_FIELDS = 32  # of a form
MOST_VALUES = 100_000  # of a JSON body, counted by its commas: no prompt needs as many, and each is looked at
LARGE_BYTES = 1 << 20  # of a body that is not parsed while other requests wait for it


def make_app(serving: Serving, key: str | None, bounds: Bounds, doors: Doors) -> App:
    """The ASGI application of a server.

    key: without it requests are refused; None for anybody. doors: whose pages may use it. What runs when it ends is
    cancelled; `Service.drain` lets it finish first.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        serving.service.start()
        yield
        await serving.service.close(0)
        serving.workers.close()
        serving.metrics.close()

    routes = [
        Route("/v1/chat/completions", _answering(serving, _chat), methods=["POST"]),
        Route("/v1/audio/transcriptions", _answering(serving, _transcription), methods=["POST"]),
        Route("/v1/audio/speech", _answering(serving, _speech), methods=["POST"]),
        Route("/v1/models", _answering(serving, _models)),
        Route("/v1/models/{name:path}", _answering(serving, _model)),
        Route("/", _answering(serving, _page)),
        Route("/health", _answering(serving, _health)),
        Route("/metrics", _answering(serving, _metrics)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error}
    app = Guard(
        Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan),
        key,
        bounds,
        doors,
        serving.metrics.count,
    )
    if not doors.origins:
        return app
    # Browsers ask first, without the key, and hide answers from pages that are not named in them.
    return CORSMiddleware(app, doors.origins, allow_methods=("GET", "POST"), allow_headers=("*",))


Endpoint = Callable[[Serving, Request], Awaitable[Response]]


def _answering(serving: Serving, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint of Starlette, whose errors are answers."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(serving, request)
        except HTTPException as error:
            response = _http_error(request, error)
        except ClientDisconnect:  # while its body came: nobody reads this
            response = Response(status_code=400)
        except Exception as error:
            found = told(error)
            response = JSONResponse(found.body(), found.status, headers=found.headers())
        return response

    return answer


def _http_error(_: Request, error: Any) -> Response:
    """Starlette's own errors, such as for an unknown path or a damaged form."""
    names = {404: "there is nothing at this path; see the routes in the documentation",
             405: "this path takes another method"}  # fmt: skip
    found = RequestError(error.status_code, names.get(error.status_code, str(error.detail)))
    return JSONResponse(found.body(), found.status, headers=error.headers)


async def _chat(serving: Serving, request: Request) -> Response:
    asked = read_chat(await _body(request), serving.defaults)
    check_model(asked.model, serving.model)
    if asked.stream:
        return await _streamed(request, serving.chunks(asked), "text/event-stream")
    return JSONResponse(await _unless_gone(request, serving.completion(asked)))


async def _transcription(serving: Serving, request: Request) -> Response:
    fields, sound = await _form(request)
    asked = read_transcription(fields, sound, serving.instruction, serving.defaults)
    check_model(asked.chat.model, serving.model)
    if asked.chat.stream:
        return await _streamed(request, _told(_transcript_events(serving, asked)), "text/event-stream")

    async def write_down() -> str:
        body = await serving.completion(asked.chat)
        return body["choices"][0]["message"]["content"]

    text = await _unless_gone(request, write_down())
    return PlainTextResponse(text) if asked.form == "text" else JSONResponse({"text": text})


async def _transcript_events(serving: Serving, asked: AskedTranscript) -> AsyncGenerator[str, None]:
    """A transcript as OpenAI's events."""
    text = ""
    async with aclosing(serving.events(asked.chat)) as events:
        async for event in events:
            text += event.text
            if event.text:
                yield sse({"type": "transcript.text.delta", "delta": event.text})
    yield sse({"type": "transcript.text.done", "text": text})


async def _speech(serving: Serving, request: Request) -> Response:
    asked = read_speech(await _body(request), serving.defaults)
    check_model(asked.model, serving.model)
    if asked.events:
        return await _streamed(request, _told(_speech_events(serving, asked)), "text/event-stream")
    headers = dict[str, str]()
    return await _streamed(request, _sound(serving, asked, headers), sounds.FORMATS[asked.sound], headers)


async def _sound(serving: Serving, asked: AskedSpeech, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    """A text that is read aloud as one sound, in pieces as it is made; why it ended is put into `headers`."""
    encoder = sounds.joined(asked.sound)
    async with aclosing(serving.aloud(asked)) as events:
        async for event in events:
            data = b"" if event.audio is None else encoder.add(event.audio)
            if event.reply is not None:
                headers["X-Finish-Reason"] = event.reply.stats["speech_finish_reason"]
                data += encoder.end()
            if data:
                yield data


async def _speech_events(serving: Serving, asked: AskedSpeech) -> AsyncGenerator[str, None]:
    """The same as OpenAI's events; the last one also states why it ended, "stop" or "length"."""
    frames, words, reason = 0, 0, "stop"
    encoder = sounds.pieces(asked.sound)

    def event_of(data: bytes) -> str:
        return sse({"type": "speech.audio.delta", "audio": b64encode(data).decode()})

    async with aclosing(serving.aloud(asked)) as events:
        async for event in events:
            if event.audio is not None and (data := encoder.add(event.audio)):
                yield event_of(data)
            if event.reply is not None:
                frames, words = event.reply.stats["frames"], len(event.reply.token_ids)
                reason = event.reply.stats["speech_finish_reason"]
    if data := encoder.end():
        yield event_of(data)
    usage = {"input_tokens": words, "output_tokens": frames, "total_tokens": words + frames}
    yield sse({"type": "speech.audio.done", "finish_reason": reason, "usage": usage})


async def _models(serving: Serving, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_of(serving)]})


async def _model(serving: Serving, request: Request) -> Response:
    check_model(request.path_params["name"], serving.model)
    return JSONResponse(_model_of(serving))


def _model_of(serving: Serving) -> dict[str, Any]:
    return model_body(serving.model, serving.created, serving.service.running.voices)


async def _page(_: Serving, __: Request) -> Response:
    if not PAGE.exists():
        raise HTTPException(404)
    return FileResponse(PAGE)


async def _health(serving: Serving, _: Request) -> Response:
    status = "closing" if serving.service.closing else "healthy" if serving.service.healthy else "unhealthy"
    return JSONResponse({"status": status}, 200 if status == "healthy" else 503)


async def _metrics(serving: Serving, _: Request) -> Response:
    return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4")


async def _body(request: Request) -> Any:
    """The JSON value of a body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _JSON or not kind and "origin" in request.headers:
        raise RequestError(415, f"the body is of the type {kind[:80]!r}; send it as application/json")
    data = await request.body()
    if (values := data.count(b",")) > MOST_VALUES:
        raise invalid(
            f"the body has {values:,} commas; at most {MOST_VALUES:,} are read: send fewer values, or shorter texts"
        )
    if len(data) <= LARGE_BYTES:
        return parse_json(data, "the body", error=InputError)
    return await asyncio.to_thread(parse_json, data, "the body", error=InputError)


async def _form(request: Request) -> tuple[dict[str, str], bytes]:
    """The fields of a form, and the contents of its one file."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(415, "the body is no form; send it as multipart/form-data with a file")
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("the form has no file; send the sound as 'file'", "file")
        return fields, await file.read()


async def _streamed(
    request: Request, pieces: AsyncGenerator[P, None], kind: str, headers: Mapping[str, str] = _NO_HEADERS
) -> Response:
    """A response of pieces; what fails before the first one has its own status.

    headers: of the response, as they are when the first piece is there.
    """
    first = await _unless_gone(request, _first(pieces))

    async def all_pieces() -> AsyncGenerator[P, None]:
        async with aclosing(pieces) as rest:
            if first is not None:
                yield first
            async for piece in rest:
                yield piece

    return StreamingResponse(all_pieces(), media_type=kind, headers={"Cache-Control": "no-cache", **headers})


async def _told(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The same events; an error after the first one is an event too, and the last."""
    begun = False
    try:
        async with aclosing(events) as rest:
            async for event in rest:
                begun = True
                yield event
    except Exception as error:
        if not begun:
            raise
        yield sse(told(error).body())


async def _first(pieces: AsyncGenerator[P, None]) -> P | None:
    """The first piece; None if there is none, as of a sound without samples."""
    return await anext(pieces, None)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work that is stopped when the client goes away; the body must have been read."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(GONE, "the client has gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
