"""The page of the server in a real browser: what it sends, shows and plays, by mouse, keyboard and microphone."""

import base64
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.serve.browsing import (
    CONTRAST,
    LISTENING,
    answers,
    ask,
    error,
    give,
    peak_of,
    say,
    sent_sound,
    wait,
    wait_for,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
scripted = pytest.importorskip("tests.serve.scripted", reason="starlette and uvicorn are not installed")

ANSWER, PIECE, WORDS = scripted.ANSWER, scripted.PIECE, scripted.WORDS
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FLAGS = (
    "--no-sandbox",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Any]:
    with scripted.serving() as server:
        yield server


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    """The page, opened; at the end there were no errors in its console and no requests to another host."""
    context = browser.new_context()
    page, problems, addresses = context.new_page(), [], []
    page.add_init_script(LISTENING)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.address)
    yield page
    context.close()
    # Chromium itself reports every status of 400 and more.
    assert not [text for text in problems if not text.startswith("Failed to load resource")]
    assert not [address for address in addresses if not address.startswith((server.address, "blob:", "data:"))]


def test_a_typed_question_is_sent_and_its_answer_shown(page, server):
    ask(page, "What is blue?")
    assert answers(page) == [ANSWER]
    assert server.asked == [
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "What is blue?"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "modalities": ["text", "audio"],
            "audio": {"voice": "ethan", "format": "pcm16"},
        }
    ]
    assert page.inner_text("#model") == "scripted"
    assert page.input_value("#message") == ""


def test_reasoning_is_shown_apart_from_the_answer(page):
    ask(page, "think")
    assert page.locator(".answer > .words").all_inner_texts() == [ANSWER]
    page.get_by_text("Reasoning").click()
    assert page.locator("details .words").inner_text() == "Water, light."


def test_the_transcript_is_shown_where_the_text_has_no_stream_of_its_own(page):
    ask(page, "aloud")
    assert answers(page) == [ANSWER]


def test_figures_of_an_answer_are_shown(page):
    ask(page, "What is blue?")
    figures = page.evaluate("omni")
    assert figures["tokens"] == len(WORDS)
    assert 0 < figures["firstToken"] <= figures["firstSound"] < 5
    assert figures["acceptedLength"] == pytest.approx(7 / 3)  # 7 tokens after the first, in 3 rounds
    shown = {item.get_attribute("data-figure"): item.inner_text() for item in page.locator("dd").all()}
    names = ["tokensPerSecond", "firstToken", "acceptedLength", "firstSound", "samplesPlayed", "underruns"]
    assert list(shown) == names and page.locator("dd:visible").count() == len(names)
    assert shown["acceptedLength"] == "2.33" and shown["samplesPlayed"] == "19,200 of 19,200"
    assert re.fullmatch(r"\d\.\d\d s", shown["firstToken"]) and re.fullmatch(r"\d\.\d\d s", shown["firstSound"])
    assert float(shown["tokensPerSecond"]) > 0 and shown["underruns"].isdigit()


def test_every_sample_is_heard_and_pieces_follow_without_gaps(page):
    say(page, "What is blue?")
    wait(page, "window.ear && loudness() > 0.2")
    wait_for(page, "idle")
    assert page.evaluate("omni.samplesReceived") == page.evaluate("omni.samplesPlayed") == len(WORDS) * PIECE
    starts = page.evaluate("starts")
    gaps = [after - before - length for (before, length), (after, _) in pairwise(starts)]
    assert min(gaps) == 0  # one after another, never two at once
    assert sum(gap > 0 for gap in gaps) == page.evaluate("omni.underruns")


def test_a_late_piece_is_counted_as_a_gap(page):
    ask(page, "with a gap")
    assert page.evaluate("omni.underruns") >= 1
    assert page.evaluate("omni.samplesPlayed") == len(WORDS) * PIECE


def test_a_stopped_answer_is_silent_at_once_and_kept(page, server):
    say(page, "endless")
    wait(page, "omni.samplesPlayed > 4800 && loudness() > 0.2")
    page.click("#stop")
    wait_for(page, "idle")
    played = page.evaluate("omni.samplesPlayed")
    assert played < page.evaluate("omni.samplesReceived")
    page.wait_for_timeout(200)
    assert page.evaluate("loudness()") == 0 and page.evaluate("omni.samplesPlayed") == played
    page.wait_for_timeout(500)
    assert server.left == 1
    assert page.inner_text(".note") == "Stopped."
    assert page.evaluate("document.activeElement.id") == "message" and not page.is_visible("#stop")
    kept = answers(page)[0]
    ask(page, "and now?")
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": kept}


def test_a_new_turn_interrupts_the_answer(page, server):
    say(page, "endless")
    wait(page, "omni.tokens > 3")
    ask(page, "no, this")
    assert answers(page)[1] == ANSWER
    assert [message["role"] for message in server.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_the_conversation_is_sent_and_cleared(page, server):
    ask(page, "one")
    ask(page, "two")
    page.click("#clear")
    ask(page, "three")
    said = [[message["content"] for message in asked["messages"]] for asked in server.asked]
    assert said == [["one"], ["one", ANSWER, "two"], ["three"]]
    assert answers(page) == [ANSWER]


def test_pictures_sounds_and_videos_are_sent_in_order(page, server, data_dir):
    names = ("flower.jpg", "espeak_stdout.wav", "cover.mp3", "hello_silent.mp4", "chelsea.png")
    page.set_input_files("#files", [data_dir / name for name in names])
    page.get_by_role("button", name="Remove chelsea.png").click()
    assert page.locator("#tray li").count() == 4
    ask(page, "What are these?")
    files = [base64.b64encode((data_dir / name).read_bytes()).decode() for name in names]
    assert server.asked[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{files[0]}"}},
        {"type": "input_audio", "input_audio": {"data": files[1], "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": files[2], "format": "mp3"}},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{files[3]}"}},
        {"type": "text", "text": "What are these?"},
    ]
    assert page.locator("#tray li").count() == 0
    assert page.locator(".user :is(img, audio, video)").count() == 4


def test_other_sounds_are_sent_as_wav(page, server, data_dir):
    import soundfile

    path = data_dir / "alsa_Front_Center.flac"
    page.set_input_files("#files", path)
    page.click("#send")
    wait(page, "omni.tokens > 0")
    with sent_sound(server.asked[0]["messages"][0]["content"][0]) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
        assert sound.getnframes() / 16000 == pytest.approx(soundfile.info(path).duration, abs=0.01)
        assert peak_of(sound) > 3000


def test_media_are_pasted_and_dropped(page):
    give(page, "paste", "pasted.png", "image/png")
    give(page, "dragover", "dropped.png", "image/png")
    assert page.locator("[data-dropping]").count() == 1
    give(page, "drop", "dropped.png", "image/png")
    assert page.locator("[data-dropping]").count() == 0
    assert page.locator("#tray span").all_inner_texts() == ["pasted.png", "dropped.png"]


def test_files_that_cannot_be_sent_are_named(page):
    give(page, "drop", "notes.txt", "text/plain")
    assert error(page) == "notes.txt is not a picture, a sound or a video."
    give(page, "drop", "noise.ogg", "audio/ogg")
    wait(page, "document.getElementById('error').textContent.includes('noise.ogg')")
    assert page.locator("#tray li").count() == 0


def test_holding_talk_sends_a_recording_when_released(page, server):
    page.hover("#talk")
    page.mouse.down()
    wait(page, "document.getElementById('recorded').textContent.startsWith('Recording, 1 s')")
    page.mouse.up()
    wait(page, "omni.tokens > 0")
    (part,) = server.asked[0]["messages"][0]["content"]
    with sent_sound(part) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (16000, 1)
        assert 0.8 < sound.getnframes() / 16000 < 6
        assert peak_of(sound) > 1000  # the fake one beeps
    assert page.locator("[data-recording]").count() == 0


def test_talk_by_two_presses_of_a_key_interrupts_the_answer(page, server):
    say(page, "endless")
    wait(page, "omni.samplesPlayed > 0")
    page.focus("#talk")
    page.keyboard.press("Space")
    wait(page, "document.getElementById('recorded').textContent.startsWith('Recording, 1 s')")
    assert page.get_attribute("#talk", "aria-pressed") == "true"
    assert page.evaluate("loudness()") == 0
    page.keyboard.press("Space")
    wait(page, "document.querySelectorAll('.answer').length === 2 && omni.tokens > 0")
    assert server.asked[1]["messages"][2]["content"][0]["type"] == "input_audio"


def test_send_ends_a_recording_too(page, server):
    page.fill("#message", "What is this sound?")
    page.focus("#talk")
    page.keyboard.press("Enter")
    wait(page, "document.getElementById('recorded').textContent.startsWith('Recording, 1 s')")
    page.click("#send")
    wait(page, "omni.tokens > 0")
    (sent,) = server.asked
    assert [part["type"] for part in sent["messages"][0]["content"]] == ["input_audio", "text"]


def test_escape_discards_a_recording(page, server):
    page.focus("#talk")
    page.keyboard.press("Enter")
    wait(page, "document.getElementById('recorded').textContent.startsWith('Recording')")
    page.keyboard.press("Escape")
    assert page.locator("[data-recording]").count() == 0
    page.wait_for_timeout(300)
    assert not server.asked and page.locator("#tray li").count() == 0


def test_speech_and_voice_are_chosen_and_remembered(page, server):
    page.select_option("#voice", "aiden")
    ask(page, "one")
    page.uncheck("#speech")
    page.reload()
    ask(page, "two")
    assert server.asked[0]["audio"]["voice"] == "aiden"
    assert server.asked[1]["modalities"] == ["text"] and "audio" not in server.asked[1]
    assert page.input_value("#voice") == "aiden" and page.is_disabled("#voice")
    assert page.is_hidden("[data-figure=samplesPlayed]") and page.is_visible("[data-figure=firstToken]")
    assert page.get_by_role("status").inner_text() == "So is the sky."  # the last sentence that was announced


def test_a_model_without_voices_is_not_asked_to_speak(page, server):
    server.voices = ()
    page.reload()
    ask(page, "one")
    assert server.asked[0]["modalities"] == ["text"]
    assert page.is_hidden("#speech") and page.is_hidden("#voice")


def test_switching_speech_off_silences_the_answer_that_is_heard(page):
    say(page, "endless")
    wait(page, "omni.samplesPlayed > 0 && loudness() > 0.2")
    page.uncheck("#speech")
    page.wait_for_timeout(200)
    assert page.evaluate("loudness()") == 0
    assert page.get_attribute("body", "data-state") == "answering"
    page.keyboard.press("Escape")
    wait_for(page, "idle")


def test_a_refused_question_returns_to_its_place(page, server):
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    say(page, "busy")
    assert error(page) == "All places are taken. Try again in 3 s."
    assert page.input_value("#message") == "busy" and page.locator("#tray li").count() == 1
    assert page.locator("#turns li").count() == 0
    ask(page, "now?")
    assert len(server.asked[1]["messages"]) == 1 and page.locator("#error").is_hidden()


@pytest.mark.parametrize(
    "question, message", [("fail", "Memory ran out."), ("cut", "The connection ended before the answer did.")]
)
def test_an_answer_that_breaks_off_is_kept_with_its_error(page, question, message):
    say(page, question)
    assert error(page) == message
    wait_for(page, "idle")
    assert answers(page) == ["The sea is blue. "] and page.inner_text(".note") == "Broken off."


def test_a_server_that_is_gone_is_reported(page):
    wait(page, "document.getElementById('model').textContent === 'scripted'")
    page.route("**/v1/*/*", lambda route: route.abort())
    say(page, "hello?")
    assert error(page) == "The server cannot be reached."


def test_a_key_is_asked_for_until_it_is_right(page, server):
    server.key = "right"
    page.reload()
    for reason, key in (("kept until this tab closes", "wrong"), ("refused", "right")):
        page.get_by_role("dialog", name="An API key is needed").wait_for()
        wait(page, f"document.getElementById('key-reason').textContent.includes('{reason}')")
        page.get_by_role("textbox", name="API key").fill(key)
        page.keyboard.press("Enter")
    wait(page, "document.getElementById('model').textContent === 'scripted'")
    ask(page, "What is blue?")
    assert page.evaluate("Object.values(sessionStorage)") == ["right"]
    assert "right" not in page.evaluate("Object.values(localStorage)")
    server.key = "changed"
    say(page, "And now?")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    assert error(page) == "The API key is wrong."


def test_everything_is_reached_by_keyboard_with_a_visible_focus(page):
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    ask(page, "a turn")
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    page.focus("#speech")
    reached = []
    while page.evaluate("document.activeElement !== document.body"):
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
        page.keyboard.press("Tab")
    assert reached == ["speech", "voice", "theme", "clear", "Remove a.png", "message", "attach", "talk", "send"]


def test_every_control_has_a_name(page):
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    tree = page.locator("body").aria_snapshot()
    controls = (
        *('switch "Speak"', 'combobox "Voice"', 'combobox "Theme"', 'button "Clear"', 'list "Attached"'),
        *('button "Remove a.png"', 'textbox "Message"', 'button "Attach"', 'button "Talk"', 'button "Send"'),
    )
    assert not [control for control in controls if control not in tree], tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_contrast_in_both_themes(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ask(page, "long")
    give(page, "drop", "a.png", "image/png")
    give(page, "drop", "notes.txt", "text/plain")
    least, text = page.evaluate(CONTRAST)
    assert least >= 4.5, text


def test_the_theme_is_switched_and_remembered(page):
    page.emulate_media(color_scheme="light")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.select_option("#theme", "dark")
    page.reload()
    assert page.evaluate(background) != light
    page.select_option("#theme", "light dark")
    assert page.evaluate(background) == light


def test_a_telephone_needs_no_scrolling_sideways(page, data_dir):
    page.set_viewport_size({"width": 390, "height": 800})
    names = ("flower.jpg", "espeak_stdout.wav", "hello_silent.mp4")
    page.set_input_files("#files", [data_dir / name for name in names])
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ask(page, "W" * 300)
    give(page, "drop", "N" * 300 + ".txt", "text/plain")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_nothing_moves_where_motion_is_reduced(page):
    moving = "[...document.querySelectorAll('*')].some((node) => getComputedStyle(node).transitionDuration !== '0s')"
    assert page.evaluate(moving)
    page.emulate_media(reduced_motion="reduce")
    assert not page.evaluate(moving)
