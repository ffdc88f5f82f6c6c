"""Fetching: allowed hosts only, at every hop, public addresses only, and bounds of size and time."""

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from omni_jax.serve import fetch as module
from omni_jax.serve.errors import RequestError
from omni_jax.serve.fetch import Reach, fetch, is_public

BODY = bytes(range(256)) * 40


class _Handler(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        what, _, rest = self.path[1:].partition("/")
        if what == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif what == "loop":
            self.send_response(307)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif what == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(50):
                self.wfile.write(b"X-A: b\r\n")
                time.sleep(0.1)
        elif what == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(BODY)
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(b"short")
        else:
            self.send_response(404 if what == "missing" else 200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def reach(host) -> Reach:
    return Reach((host,), seconds=5.0, may_connect=lambda address: True)


def _refused(url: str, reach: Reach, most: int = 1 << 20) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fetch(url, most, reach)
    return caught.value


def test_allowed_hosts_are_fetched(host, reach):
    assert fetch(f"http://{host}/a?b=c%20d&e=ü", 1 << 20, reach) == BODY
    assert fetch(f"http://{host}/to//a", 1 << 20, reach) == BODY
    assert fetch(f"http://{host}/to/http://{host}/a", 1 << 20, reach) == BODY


@pytest.mark.parametrize(
    "url",
    [
        "http://{host}/",
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://user@example.com/",
        "http://example.com@127.0.0.1/",
        "http://example.com:81/",
        "http://example.com.evil.org/",
        "http://notexample.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://",
        "http://example.com:99999/",
        "http://[::1",
    ],
)
def test_other_hosts_are_refused(url, host):
    # Not even asked for: with this resolver, any connection would be an error of another kind.
    error = _refused(url.format(host=host), Reach(("example.com",)))
    assert error.status == 400


def test_domains_and_what_is_below_them():
    reach = Reach(("a.com", "*.b.com", "c.com:8443"))
    for host, port in (("a.com", 443), ("x.b.com", 443), ("x.y.b.com", 443), ("c.com", 8443)):
        assert reach.allows(host, port, "https")
    for host, port in (("x.a.com", 443), ("b.com", 443), ("xb.com", 443), ("c.com", 443), ("a.com", 8443)):
        assert not reach.allows(host, port, "https")


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fd00:ec2::254", False), ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("ff02::1", False), ("fec0::1", False),
        ("64:ff9b::8.8.8.8", True), ("64:ff9b:1::7f00:1", False), ("64:ff9b:1:7f00:0:100::", False),
        ("::127.0.0.1", False), ("::10.0.0.1", False), ("::ffff:0:127.0.0.1", False), ("::ffff:0:8.8.8.8", True),
        ("168.63.129.16", False), ("::ffff:168.63.129.16", False), ("168.63.129.17", True),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_private_addresses_of_allowed_hosts_are_refused(host):
    error = _refused(f"http://{host}/a", Reach((host,)))
    assert "public internet" in error.message


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    found = [(2, 1, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "public internet" in _refused("http://example.com/", Reach(("example.com",))).message


def test_names_are_resolved_once_and_the_address_is_kept(host, monkeypatch):
    """A name that resolves to a public address first, and to a private one afterwards."""
    port, asked, connected = int(host.partition(":")[2]), [], []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *_, **__: asked.append(name) or [(2, 1, 6, "", ("9.9.9.9", port))]
    )

    def connect(address, timeout):
        connected.append(address)
        plain = socket.socket()
        plain.settimeout(timeout)
        plain.connect(("127.0.0.1", port))
        return plain

    monkeypatch.setattr(module.socket, "create_connection", connect)
    assert fetch(f"http://example.com:{port}/a", 1 << 20, Reach((f"example.com:{port}",))) == BODY
    assert asked == ["example.com"] and connected == [("9.9.9.9", port)]


def test_every_redirect_is_checked(host, reach):
    before = len(_Handler.asked)
    for target in ("http://127.0.0.1:1/", "http://169.254.169.254/", "file:///etc/passwd", "//evil.org/"):
        assert _refused(f"http://{host}/to/{target}", reach).status == 400
    assert len(_Handler.asked) == before + 4
    assert "redirects" in _refused(f"http://{host}/loop", reach).message


def test_size_is_bounded(host, reach):
    assert fetch(f"http://{host}/a", len(BODY), reach) == BODY
    for path in ("a", "endless"):
        error = _refused(f"http://{host}/{path}", reach, len(BODY) - 1)
        assert error.status == 413 and f"{len(BODY) - 1:,}" in error.message


def test_time_is_bounded(host):
    start = time.monotonic()
    error = _refused(f"http://{host}/slow", Reach((host,), 0.5, lambda address: True))
    assert time.monotonic() - start < 2 and "0.5 s" in error.message


def test_failures_of_the_host(host, reach):
    assert "404" in _refused(f"http://{host}/missing", reach).message
    assert _refused(f"http://{host}/cut", reach).status == 400
    assert _refused("http://127.0.0.1:1/", Reach(("127.0.0.1:1",), 5, lambda address: True)).status == 400
