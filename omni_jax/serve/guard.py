"""What every request passes before it is looked at: whose page sent it, the server's key, bounds of bodies."""

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

AT_ONCE = 8  # bodies of the largest size that all requests under way may have together
RETRY_SECONDS = 5  # until it is worth to send a body again that had no room
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
        self._held = 0  # bytes of the bodies of all requests that are under way

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
        body = _Body(self, receive)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self._held -= body.size

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
        if stated.isdigit():
            self.check_size(0, int(stated[:20]))

    def check_size(self, size: int, more: int) -> None:
        """RequestError if a body of which `size` bytes are held may not have so many more."""
        most = self.bounds.most_bytes
        if size + more > most:
            raise too_large(f"the body has more than {most:,} bytes; send fewer or smaller media")
        if self._held + more > AT_ONCE * most:
            message = f"the bodies of all requests have at most {AT_ONCE * most:,} bytes together; try again soon"
            raise RequestError(429, message, code="bodies_full", retry_seconds=RETRY_SECONDS)

    def hold(self, size: int, more: int) -> int:
        """Take in `more` bytes of a body: how many it has now; RequestError if it may not have them."""
        self.check_size(size, more)
        self._held += more
        return size + more


class _Body:
    """The body of a request as it comes: one that is too large or too slow is an error. size: what is held of it."""

    def __init__(self, guard: Guard, receive: Receive):
        self.size = 0
        self._guard, self._receive, self._complete = guard, receive, False
        self._deadline = time.monotonic() + guard.bounds.seconds

    async def receive(self) -> Message:
        """The next message of the client."""
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0.001))
        except TimeoutError:
            message = f"the body took more than {self._guard.bounds.seconds:g} s; send it faster"
            raise RequestError(408, message, code="timeout") from None
        self._complete = not message.get("more_body", False)
        self.size = self._guard.hold(self.size, len(message.get("body", b"")))
        return message
