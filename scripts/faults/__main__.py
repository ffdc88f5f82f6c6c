"""Ill-treat a server of this checkout: bad requests, clients that vanish, signals, a full disk for its log.

    python -m scripts.faults --model nano

Each bad request must have one of the statuses that are right for it and a reason; after every few of them, and after
everything else, the server must answer a good one. Ends with status 1 if anything was otherwise. Linux only.
"""

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import tyro

from scripts.faults.requests import CHAT, Fault, faults
from scripts.served import Served, served

EACH, SECONDS = 20, 120
FLAGS = ("--slots", "4", "--waiting", "64", "--body-seconds", "3")


@dataclass(frozen=True)
class Options:
    """What is ill-treated, and how much."""

    model: str
    """Model to serve."""
    vanish: int = 40
    """Clients that go at a random moment."""
    seed: int = 0
    """Of these moments."""


class Findings:
    """What was not as it must be."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def check(self, good: bool, what: str) -> None:
        """Take note of something that is not good."""
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


def send(found: Served, fault: Fault) -> tuple[int, bytes]:
    """The status and body of the answer to a request; 0 if the connection was closed without one."""
    address = urlsplit(found.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
    try:
        connection.putrequest(fault.method, fault.path, skip_host="Host" in fault.headers)
        for name, value in {"Content-Length": str(len(fault.body)), **fault.headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        # A server may answer, and close, before all of a body is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(fault.body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, OSError, ValueError) as error:
        return 0, repr(error).encode()
    finally:
        connection.close()


def answers(found: Served) -> bool:
    """Whether the server answers a good request."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
    status, data = send(found, Fault("", CHAT, body, (200,)))
    return status == 200 and bool(json.loads(data)["choices"])


def refuse(found: Served, findings: Findings) -> None:
    """Send all that must be refused."""
    asked, statuses = faults(), Counter[int]()
    for number, fault in enumerate(asked):
        if fault.path.startswith("/\x7f"):
            status, data = _raw(found, b"GET /\x7f HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        else:
            status, data = send(found, fault)
        statuses[status] += 1
        findings.check(status in fault.statuses, f"{fault.what}: status {status}, not {fault.statuses}: {data[:200]!r}")
        if status == 400 and fault.path.startswith("/v1/") and fault.method == "POST":
            findings.check(_has_reason(data), f"{fault.what}: no reason in {data[:200]!r}")
        if number % EACH == EACH - 1:
            findings.check(answers(found), f"no answer after {fault.what}")
    shown = ", ".join(f"{number} with {status}" for status, number in sorted(statuses.items()))
    print(f"{len(asked)} bad requests: {shown}", flush=True)


def _has_reason(data: bytes) -> bool:
    try:
        return bool(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


def _raw(found: Served, sent: bytes, seconds: float = 60.0) -> tuple[int, bytes]:
    """The status and answer to bytes as they are; 0 if there is none."""
    address = urlsplit(found.url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        connection.sendall(sent)
        data = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                data += part
    first = data.split(b" ", 2)
    return (int(first[1]) if len(first) > 1 and first[1].isdigit() else 0), data


def dawdle(found: Served, findings: Findings) -> None:
    """Bodies that come too slowly, too short, or never."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    for what, sent, statuses in (
        ("a body that never comes", head + b"Content-Length: 100\r\n\r\n", (408,)),
        ("a body that stops", head + b'Content-Length: 100\r\n\r\n{"messages', (408,)),
        ("a length that is no number", head + b"Content-Length: many\r\n\r\n", (400,)),
        ("chunks that are none", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", (400,)),
        ("headers that do not end", f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-A: ".encode(), (408,)),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", (400,)),
    ):
        status, data = _raw(found, sent)
        findings.check(status in statuses, f"{what}: status {status}, not {statuses}: {data[:100]!r}")
    findings.check(answers(found), "no answer after slow bodies")
    print("slow and broken connections were refused", flush=True)


def vanish(found: Served, options: Options, findings: Findings) -> None:
    """Clients that close their connection at a random moment of a reply, some of them spoken."""
    draw = random.Random(options.seed)
    moments = [(draw.uniform(0, 1.5), draw.random() < 0.3) for _ in range(options.vanish)]

    def go(moment: tuple[float, bool]) -> None:
        seconds, speaks = moment
        fields = {"modalities": ["text", "audio"], "max_frames": 100} if speaks else {}
        asked = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 400,
            "stream": True,
            "ignore_eos": True,
        }
        address, body = urlsplit(found.url), json.dumps({**asked, **fields}).encode()
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        time.sleep(seconds)
        connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(go, moments))
    end = time.monotonic() + SECONDS
    while (left := _running(found)) and time.monotonic() < end:
        time.sleep(0.2)
    findings.check(not left, f"{left} replies still run for clients that are gone")
    findings.check(answers(found), "no answer after clients vanished")
    print(f"{options.vanish} clients vanished; their slots came free", flush=True)


def _running(found: Served) -> float:
    """Replies that run or wait, by the server's own figures."""
    _, data = send(found, Fault("", "/metrics", b"", (200,), {}, "GET"))
    lines = dict(line.split(" ", 1) for line in data.decode().splitlines() if " " in line and not line.startswith("#"))
    return float(lines["omni_jax_running"]) + float(lines["omni_jax_waiting"])


def _stream(found: Served, tokens: int) -> tuple[int, bytes]:
    fields = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], **fields}).encode()
    return send(found, Fault("", CHAT, body, (200,)))


def terminate(model: str, findings: Findings) -> None:
    """SIGTERM while replies run: they end whole, and the server leaves with status 0."""
    with served(model, *FLAGS) as found, ThreadPoolExecutor(4) as pool:
        answers(found)
        running = [pool.submit(_stream, found, 200) for _ in range(4)]
        time.sleep(1.0)
        found.process.send_signal(signal.SIGTERM)
        ended = [future.result() for future in running]
        findings.check(all(data.endswith(b"data: [DONE]\n\n") for _, data in ended), "SIGTERM cut replies")
        findings.check(found.process.wait(SECONDS) == 0, "no status 0 after SIGTERM")
    print("SIGTERM under load: replies ended whole, status 0", flush=True)


def kill(model: str, findings: Findings) -> None:
    """SIGKILL while replies run, of the server and of a process that decodes media; the next one answers."""
    with served(model, *FLAGS) as found, ThreadPoolExecutor(4) as pool:
        answers(found)
        running = [pool.submit(_stream, found, 400) for _ in range(4)]
        time.sleep(1.0)
        found.process.kill()
        ended = [future.result() for future in running]
        findings.check(not any(data.endswith(b"[DONE]\n\n") for _, data in ended), "the kill came too late")
        found.process.wait()
    with served(model, *FLAGS) as found:
        findings.check(answers(found), "no answer after a kill and a new start")
    print("SIGKILL under load: clients were told by closed connections, a new server answers", flush=True)


def full_disk(model: str, findings: Findings) -> None:
    """A log that cannot be written."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "omni_jax", "serve", "--model", model, "--port", str(port), *FLAGS]
        process = subprocess.Popen(command, stderr=full, stdout=full)
        try:
            found, end = Served(process, f"http://127.0.0.1:{port}", full), time.monotonic() + SECONDS
            while send(found, Fault("", "/health", b"", (200,), {}, "GET"))[0] != 200 and time.monotonic() < end:
                time.sleep(0.2)
            send(found, Fault("", CHAT, b"{", (400,)))
            findings.check(answers(found), "no answer with a full disk for the log")
            findings.check(found.end() == 0, "no status 0 with a full disk for the log")
        finally:
            process.kill()
            process.wait()
    print("a full disk for the log: answered", flush=True)


def main() -> int:
    """All of it: 0 if nothing was wrong."""
    options, findings = tyro.cli(Options, prog="python -m scripts.faults", description=__doc__), Findings()
    with served(options.model, *FLAGS) as found:
        findings.check(answers(found), "no answer at the start")
        refuse(found, findings)
        dawdle(found, findings)
        vanish(found, options, findings)
        findings.check("Traceback" not in found.log(), f"a traceback in the log: {found.log()[-2000:]}")
        findings.check(found.end() == 0, "no status 0 at the end")
    terminate(options.model, findings)
    kill(options.model, findings)
    full_disk(options.model, findings)
    print(f"{len(findings.wrong)} findings" if findings.wrong else "nothing was wrong")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
