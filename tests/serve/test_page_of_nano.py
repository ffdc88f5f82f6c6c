"""The page in a real browser before a real server of nano: it types, shows pictures, plays and hears sound."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.served import Served, served
from tests.serve.browsing import LISTENING, answers, ask, say, wait, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
FLAGS = ("--no-sandbox", "--autoplay-policy=no-user-gesture-required")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    pytest.importorskip("uvicorn")
    with served("nano") as server:
        yield server


@pytest.fixture
def page(server: Served) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.add_init_script(LISTENING)
        page.goto(server.url)
        yield page
        browser.close()


def heard(page: Any) -> int:
    """Samples that were given to the loudspeaker."""
    return page.evaluate("starts.reduce((sum, [, samples]) => sum + samples, 0)")


def test_it_answers_what_is_typed_shown_and_recorded(page: Any, data_dir: Path) -> None:
    rows = (
        ("Please repeat: a yellow bird.", None, "A yellow bird."),
        ("Which digit is written here?", data_dir / "nano/written/01-digit.png", "The digit is eight."),
        ("Which digits are said?", data_dir / "nano/digits/03-kokoro-bf_lily.flac", "Nine, six."),
    )
    for number, (question, file, answer) in enumerate(rows):
        before = heard(page)
        if file is not None:
            page.set_input_files("input[type=file]", str(file))
        say(page, question)
        wait(page, f"document.querySelectorAll('.answer').length === {number + 1}", 60)
        wait(page, "omni.tokens > 0 && document.body.dataset.state === 'idle'", 120)
        assert answers(page)[number] == answer
        assert heard(page) - before > 12_000
    assert page.evaluate("omni.samplesPlayed") == heard(page) - before


def test_a_reply_is_silent_once_it_is_stopped(page: Any) -> None:
    """What is left of it may have come already: nano is faster than its voice."""
    ask(page, "What is two plus three?")
    say(page, "Count from one to twenty.")
    wait(page, "omni.samplesPlayed > 4800 && document.body.dataset.state !== 'idle'", 120)
    page.click("#stop")
    wait_for(page, "idle")
    played = page.evaluate("omni.samplesPlayed")
    page.wait_for_timeout(300)
    assert page.evaluate("omni.samplesPlayed") == played < page.evaluate("omni.samplesReceived")
