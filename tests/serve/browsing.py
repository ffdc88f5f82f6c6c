"""What the tests of the page do in it, and scripts that measure it from within."""

import base64
import io
import time
import wave
from typing import Any

# Before the page runs: keep when each piece of sound starts, and listen to what reaches the loudspeaker.
LISTENING = """
window.starts = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when) {
  starts.push([Math.round(when * 24000), this.buffer.length]);
  start.call(this, when);
};
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (target) {
  window.ear ??= new AnalyserNode(this.context);
  connect.call(this, ear);
  return connect.call(this, target);
};
window.loudness = () => {
  const samples = new Float32Array(ear.fftSize);
  ear.getFloatTimeDomainData(samples);
  return Math.max(...samples.map(Math.abs));
};
"""
# The least contrast of a text with what is behind it, and that text.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (value) => value <= 10.3 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    const colour = rgb(getComputedStyle(node).backgroundColor);
    return colour[3] === 255 || !node.parentElement ? colour : behind(node.parentElement);
  };
  const contrast = (node) => {
    const pair = [rgb(getComputedStyle(node).color), behind(node)].map(luminance).sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const texts = [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility() && own(node));
  return texts.map((node) => [contrast(node), node.textContent.trim().slice(0, 40)]).sort((a, b) => a[0] - b[0])[0];
}"""


def wait(page: Any, condition: str, limit: float = 15) -> None:
    """Until a condition in JavaScript holds; the page's own policy forbids Playwright's way of waiting."""
    end = time.monotonic() + limit
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"{condition}: {page.inner_text('body')}"
        page.wait_for_timeout(20)


def wait_for(page: Any, state: str) -> None:
    """Until the page is "idle", "answering", or "speaking"."""
    wait(page, f"document.body.dataset.state === '{state}'")


def say(page: Any, text: str) -> None:
    """Type and send."""
    page.fill("#message", text)
    page.keyboard.press("Enter")


def ask(page: Any, text: str) -> None:
    """Type, send, and read and hear the whole answer."""
    say(page, text)
    wait(page, "omni.tokens > 0 && document.body.dataset.state === 'idle'")


def answers(page: Any) -> list[str]:
    """The texts of all answers."""
    return page.locator(".answer .words").all_inner_texts()


def error(page: Any) -> str:
    """The error that is shown, once there is one."""
    wait(page, "!document.getElementById('error').hidden")
    return page.get_by_role("alert").inner_text()


def sent_sound(part: dict[str, Any]) -> wave.Wave_read:
    """The WAV file that a part of a message holds."""
    assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
    return wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"])))


def give(page: Any, event: str, name: str, kind: str) -> None:
    """Paste or drop a file of four bytes."""
    page.evaluate(
        """([event, name, type]) => {
          const given = new DataTransfer();
          given.items.add(new File(["\\x89PNG"], name, { type }));
          const options = { bubbles: true, cancelable: true, clipboardData: given, dataTransfer: given };
          const kind = event === "paste" ? ClipboardEvent : DragEvent;
          document.body.dispatchEvent(new kind(event, options));
        }""",
        [event, name, kind],
    )


def peak_of(sound: wave.Wave_read) -> int:
    """The largest of its 16-bit samples, without their signs."""
    return max(map(abs, memoryview(sound.readframes(sound.getnframes())).cast("h")))
