"""Requests that a server must refuse, and how the script that sends them finds one that was not."""

from collections.abc import Callable
from typing import Any

import pytest

from scripts.faults import __main__ as script
from scripts.faults.requests import Fault, faults

REASON = b'{"error": {"message": "no"}}'


@pytest.fixture(scope="module")
def asked() -> list[Fault]:
    return faults()


def refused(monkeypatch: pytest.MonkeyPatch, asked: list[Fault], answer: Callable[[Fault], tuple[int, bytes]]) -> Any:
    """What is found wrong with a server that gives these answers."""
    findings = script.Findings()
    monkeypatch.setattr(script, "faults", lambda: asked)
    monkeypatch.setattr(script, "send", lambda found, fault: answer(fault))
    monkeypatch.setattr(script, "_raw", lambda found, sent: (400, REASON))
    monkeypatch.setattr(script, "answers", lambda found: True)
    script.refuse(None, findings)  # pyright: ignore[reportArgumentType]
    return findings.wrong


def test_each_request_is_another(asked: list[Fault]) -> None:
    assert len(asked) >= 200 and len({fault.what for fault in asked}) == len(asked)
    assert all(fault.statuses and 200 not in fault.statuses for fault in asked)


def test_a_server_that_refuses_everything_is_right(monkeypatch: pytest.MonkeyPatch, asked: list[Fault]) -> None:
    assert not refused(monkeypatch, asked, lambda fault: (fault.statuses[0], REASON))


def test_what_is_not_refused_is_found(monkeypatch: pytest.MonkeyPatch, asked: list[Fault]) -> None:
    taken = next(fault for fault in asked if fault.what.startswith("video: ten hours"))

    def answer(fault: Fault) -> tuple[int, bytes]:
        return (200 if fault is taken else fault.statuses[0]), REASON

    assert [taken.what in wrong for wrong in refused(monkeypatch, asked, answer)] == [True]


def test_a_refusal_has_a_reason(monkeypatch: pytest.MonkeyPatch, asked: list[Fault]) -> None:
    wrong = refused(monkeypatch, asked, lambda fault: (fault.statuses[0], b"no"))
    assert wrong and all("no reason" in one for one in wrong)
