"""Connections whose headers come late, or whose answers are not read, are closed, and others are not."""

import asyncio
import http.client
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from omni_jax.serve import connections
from tests.helpers.serving import listening

uvicorn = pytest.importorskip("uvicorn")


async def app(scope, receive, send):
    """Answers with the length of the body."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.6)
    with listening(app, http=connections.timely_protocol()) as url:
        yield urlsplit(url)


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nHost: a\r\nX-A: "], ids=["nothing", "half"])
def test_headers_that_do_not_end(address, sent):
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        start = time.monotonic()
        connection.sendall(sent)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ") and not connection.recv(100)
        assert time.monotonic() - start > 0.5


def test_a_slow_body_and_a_second_request_are_answered(address):
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1")
        time.sleep(1.0)
        connection.sendall(b"2")
        assert connection.recv(1000).endswith(b"2")
    again = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    for _ in range(2):
        again.request("POST", "/", b"123")
        assert again.getresponse().read() == b"3"
    again.close()


PIECE = bytes(1 << 16)


@pytest.fixture
def endless(monkeypatch):
    """The address of a server of answers without end, and what tells that one has ended."""
    responses = pytest.importorskip("starlette.responses")
    ended = threading.Event()

    async def pieces():
        try:
            while True:
                await asyncio.sleep(0)  # as an answer waits for what it sends next
                yield PIECE
        finally:
            ended.set()

    async def answer(scope, receive, send):
        if scope["type"] == "http":
            await responses.StreamingResponse(pieces())(scope, receive, send)

    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    with listening(answer, http=connections.timely_protocol()) as url:
        yield urlsplit(url), ended


def test_an_answer_that_nobody_reads_ends(endless):
    address, ended = endless
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ended.wait(20)


def test_an_answer_that_is_read_goes_on(endless):
    address, ended = endless
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        start = time.monotonic()
        while time.monotonic() - start < 3:
            assert connection.recv(1 << 20) and not ended.is_set()
            time.sleep(0.01)
    assert ended.wait(20)


def test_the_end_of_an_answer_that_nobody_reads(monkeypatch):
    """The last few bytes are not waited for without end either, when the answer itself is over."""
    made, lost = list[asyncio.Transport](), threading.Event()

    class Watched(connections.timely_protocol()):
        def connection_made(self, transport):
            super().connection_made(transport)
            made.append(transport)

        def connection_lost(self, exc):
            super().connection_lost(exc)
            lost.set()

    async def answer(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not made[0].get_write_buffer_size():
            writing = send({"type": "http.response.body", "body": PIECE[:1000], "more_body": True})
            await asyncio.wait([asyncio.ensure_future(writing)], timeout=0.2)
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    with listening(answer, http=Watched) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert lost.wait(20)
