"""What every request passes before it is looked at: whose page sent it, the server's key, bounds of its body."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from omni_jax.serve.doors import Doors
from omni_jax.serve.errors import RequestError, too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN = ("/health", "/")  # paths that need no key: the page asks for it, and holds nothing itself

OTHER = "other"  # the route of unknown paths, and of what is refused before it has one


@dataclass(frozen=True)
class Bounds:
    """most_bytes: of a body. seconds: until all of it must be there."""

    most_bytes: int = 64 << 20
    seconds: float = 60.0


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, key: str | None, bounds: Bounds, doors: Doors, count: Callable[[str, int], None]):
        """key: what clients send as bearer token; None for anybody. count: takes note of the route and the status."""
        self.app, self.bounds, self.doors, self._count = app, bounds, doors, count
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        send = self._counted(scope, send)
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self.doors.check(headers)
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_length(headers.get(b"content-length", b""))
        except RequestError as error:
            from starlette.responses import JSONResponse

            refusal = JSONResponse(error.body(), error.status, headers=error.headers())
            return await refusal(scope, receive, send)
        await self.app(scope, self._bounded(receive), send)

    def _counted(self, scope: Message, send: Send) -> Send:
        """The same, but the status of the answer is counted."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The router writes down its route, so that clients cannot invent any.
                self._count(getattr(scope.get("route"), "path", OTHER), message["status"])
            await send(message)

        return counted

    def _check_key(self, path: str, stated: bytes) -> None:
        """RequestError unless the key is right; how long that takes says nothing about it."""
        scheme, _, token = stated.partition(b" ")
        right = self._key is None or hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"
        if not right and path not in OPEN:
            message = "this server needs its key; send it as 'Authorization: Bearer KEY'"
            raise RequestError(401, message, code="invalid_api_key")

    def _check_length(self, stated: bytes) -> None:
        if stated.isdigit() and int(stated[:20]) > self.bounds.most_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return too_large(f"the body has more than {self.bounds.most_bytes:,} bytes; send fewer or smaller media")

    def _bounded(self, receive: Receive) -> Receive:
        """The same, but a body that is too large or too slow is an error."""
        deadline, size, complete = time.monotonic() + self.bounds.seconds, 0, False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                message = f"the body took more than {self.bounds.seconds:g} s; send it faster"
                raise RequestError(408, message, code="timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.bounds.most_bytes:
                raise self._too_large()
            return message

        return bounded
