"""What bodies of requests may have: each by itself, and all that are under way together."""

import asyncio
from typing import Any

from omni_jax.serve.doors import Doors
from omni_jax.serve.errors import RequestError
from omni_jax.serve.guard import AT_ONCE, Bounds, Guard

MOST = 1000
PIECE = 500


class Client:
    """A request whose body comes in pieces, each when `send` is called; statuses: of its answer."""

    def __init__(self, guard: Guard, length: int | None = None):
        self.pieces, self.statuses, self.headers = asyncio.Queue[dict[str, Any]](), [], {}
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        scope = {"type": "http", "path": "/", "method": "POST", "headers": headers}
        self.work = asyncio.create_task(guard(scope, self.pieces.get, self._take))

    async def send(self, size: int, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        await asyncio.sleep(0.01)

    async def _take(self, message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}


class App:
    """Reads a body, and answers once `free` is set."""

    def __init__(self):
        self.free = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        status, headers = 200, []
        try:
            while (await receive())["more_body"]:
                pass
            await self.free.wait()
        except RequestError as error:
            status, headers = error.status, [(k.lower().encode(), v.encode()) for k, v in error.headers().items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})


def _run(scenario):
    async def inside():
        app = App()
        await scenario(Guard(app, None, Bounds(MOST, 5.0), Doors(), lambda route, status: None), app)

    asyncio.run(inside())


def test_bodies_that_are_under_way_have_room_together():
    async def scenario(guard, app):
        held = [Client(guard) for _ in range(AT_ONCE)]
        for client in held:
            await client.send(PIECE)
            await client.send(MOST - PIECE, more=False)
        stated, piecewise, empty = Client(guard, 1), Client(guard), Client(guard)
        await piecewise.send(1)
        await empty.send(0, more=False)
        for refused in (stated, piecewise):
            await refused.work
            assert refused.statuses == [429] and int(refused.headers["retry-after"]) > 0
        app.free.set()
        await asyncio.gather(*(client.work for client in (*held, empty)))
        assert all(client.statuses == [200] for client in (*held, empty))
        later = Client(guard, MOST)
        await later.send(MOST, more=False)
        await later.work
        assert later.statuses == [200]

    _run(scenario)


def test_room_is_given_back_however_a_request_ends():
    async def scenario(guard, app):
        for _ in range(3):
            gone = [Client(guard) for _ in range(AT_ONCE)]
            for client in gone:
                await client.send(MOST)
            assert not any(client.statuses for client in gone)
            for client in gone[1:]:
                client.work.cancel()
            await gone[0].send(1)
            await asyncio.gather(*(client.work for client in gone), return_exceptions=True)
            assert gone[0].statuses == [413]

    _run(scenario)
