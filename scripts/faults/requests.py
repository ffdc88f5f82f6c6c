"""Requests that a server must refuse, each with the statuses that are right for it.

Bad bodies, fields, media, sizes, paths and addresses; nothing here needs another host, or harms one.
"""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

CHAT, SPEECH, TRANSCRIPTION = "/v1/chat/completions", "/v1/audio/speech", "/v1/audio/transcriptions"
BAD, TOO_LARGE = (400,), (400, 413)
ASKED = [{"role": "user", "content": "Hello"}]


class Fault(NamedTuple):
    """A request and the statuses, one of which its answer has."""

    what: str
    path: str
    body: bytes
    statuses: tuple[int, ...]
    headers: dict[str, str] = {"Content-Type": "application/json"}  # noqa: RUF012
    method: str = "POST"


def faults() -> list[Fault]:
    """All of them."""
    return [*bodies(), *fields(), *conversations(), *media(), *speeches(), *transcriptions(), *routes(), *sizes()]


def chat(what: str, statuses: tuple[int, ...] = BAD, **fields: Any) -> Fault:
    """A chat request whose fields are as given."""
    return Fault(what, CHAT, json.dumps({"messages": ASKED, "max_tokens": 4, **fields}).encode(), statuses)


def bodies() -> Iterator[Fault]:
    """Bodies that are no request."""
    texts = {
        "an empty body": b"",
        "an open object": b"{",
        "a list": b"[]",
        "a number": b"7",
        "null": b"null",
        "a string": b'"messages"',
        "brackets in brackets": b"[" * 20_000,
        "objects in objects": b'{"a":' * 20_000,
        "no UTF-8": b'{"messages": "\xff\xfe"}',
        "UTF-16": '{"messages": []}'.encode("utf-16"),
        "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 0}',
        "a number of 10,000 digits": b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        "two values": b"{} {}",
        "single quotes": b"{'messages': []}",
        "a comment": b'{"messages": [] /* all */}',
        "zeros": bytes(64),
        "compressed": zlib.compress(b"{}"),
        "no messages": b"{}",
        "a name without a value": b'{"messages"}',
    }
    for what, body in texts.items():
        yield Fault(f"body: {what}", CHAT, body, BAD)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png", ""):
        yield Fault(f"body of type {kind!r}", CHAT, b"{}", (400, 415), {"Content-Type": kind})


def fields() -> Iterator[Fault]:
    """Fields with values that cannot be."""
    values: dict[str, tuple[Any, ...]] = {
        "max_tokens": (0, -1, 1.5, "many", True, [], 10**12),
        "max_completion_tokens": (0, -5, {}),
        "temperature": (-1, "hot", [], True),
        "top_p": (0, 1.5, -0.1, "all"),
        "top_k": (-2, 1.5, "all"),
        "min_p": (-1, 2),
        "repetition_penalty": (0, -1, "x"),
        "seed": (-1, 2**64, 1.5, "lucky"),
        "n": (0, -1, 129, 1.5, "two", 100),
        "stop": (5, [""], [1], {}),
        "stop_token_ids": (5, ["x"], [-1], [10**9]),
        "logprobs": ("yes", 3),
        "top_logprobs": (21, -1, "x"),
        "stream": ("yes", 1),
        "modalities": (["smell"], "text", [], [1], ["text", "text", "taste"]),
        "audio": ("loud", {"format": "aiff"}, {"voice": "nobody"}, {"speed": 2}),
        "tools": ("all", [1], [{}], [{"type": "function"}]),
        "tool_choice": ("must", 5, {"type": "function"}),
        "chat_template_kwargs": ("x", {"chat_template": "{{ 1 }}"}),
        "mm_processor_kwargs": (5, {"fps": -1}, {"nobody": 1}),
        "model": ("gpt-4", 5, ["nano"]),
        "response_format": ({"type": "json_object"}, "json"),
        "logit_bias": ({"5": 100}, 5),
        "presence_penalty": (1, "x"),
        "best_of": (2,),
        "use_beam_search": (True,),
        "nobody_knows_this": (1,),
        "ignore_eos": ("yes",),
        "max_frames": (0, -1, "x"),
        "speaker": (5, "nobody"),
    }
    for name, wrong in values.items():
        for value in wrong:
            spoken = {"modalities": ["text", "audio"]} if name in ("audio", "max_frames", "speaker") else {}
            yield chat(f"{name} {str(value)[:30]}", (400, 404, 429), **{**spoken, name: value})


def conversations() -> Iterator[Fault]:
    """Messages that are no conversation."""
    wrong: dict[str, Any] = {
        "no list": "Hello",
        "an object": {},
        "empty": [],
        "of numbers": [1, 2],
        "without a role": [{"content": "x"}],
        "of an unknown role": [{"role": "ghost", "content": "x"}],
        "without content": [{"role": "user"}],
        "content that is a number": [{"role": "user", "content": 5}],
        "an empty part": [{"role": "user", "content": [{}]}],
        "a part of no type": [{"role": "user", "content": [{"text": "x"}]}],
        "a part of an unknown type": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
        "a part that is a number": [{"role": "user", "content": [5]}],
        "10,000 parts": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 10_000}],
        "10,000 messages": [{"role": "user", "content": "x"}] * 10_000,
        "a text that is a number": [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        "an audio of an id": [{"role": "assistant", "audio": {"id": "audio_1"}}, *ASKED],
        "calls that are none": [{"role": "assistant", "tool_calls": [{"function": 5}]}, *ASKED],
    }
    for what, messages in wrong.items():
        yield chat(f"messages: {what}", TOO_LARGE, messages=messages)


def media() -> Iterator[Fault]:
    """Media that are none, that are elsewhere, and that are far larger than they look."""
    addresses = (
        "/etc/passwd",
        "file:///etc/passwd",
        "../../etc/passwd",
        "FILE:/etc/passwd",
        "file://localhost/etc/passwd",
        "http://127.0.0.1:1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://169.254.169.254/latest",
        "http://0x7f000001/a",
        "http://2130706433/",
        "http://127.1/",
        "http://0.0.0.0/",
        "http://[::ffff:127.0.0.1]/",
        "http://10.0.0.1/a.png",
        "https://192.168.1.1/",
        "ftp://127.0.0.1/a.png",
        "gopher://127.0.0.1/",
        "data:",
        "data:,",
        "data:image/png;base64,",
        "data:image/png;base64,!!!!",
        "data:image/png,abc",
        "javascript:1",
        "",
        " ",
        "\\\\host\\a",
        "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
        "http://a@127.0.0.1/",
        "blob:abc",
    )
    for kind in ("image_url", "audio_url", "video_url"):
        for address in addresses:
            part = {"type": kind, kind: {"url": address}}
            yield chat(f"{kind} {address[:40]!r}", messages=[{"role": "user", "content": [part]}])
    for what, data in {**files(), **bombs()}.items():
        for kind in ("image", "audio", "video"):
            url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
            part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
            yield chat(f"{kind}: {what}", TOO_LARGE, messages=[{"role": "user", "content": [part]}])
    tiny = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(8, 8)).decode()}"}}
    yield chat("300 pictures", TOO_LARGE, messages=[{"role": "user", "content": [tiny] * 300}])
    for sound in ({"data": "!!", "format": "wav"}, {"data": "AAAA", "format": "pcm16"}, {"format": "wav"}, "AAAA", {}):
        part = {"type": "input_audio", "input_audio": sound}
        yield chat(f"input_audio {str(sound)[:40]}", messages=[{"role": "user", "content": [part]}])


def files() -> dict[str, bytes]:
    """Files that are nothing, or that claim too much."""
    whole = png(16, 16)
    return {
        "zeros": bytes(1000),
        "text": b"Hello, I am a picture." * 20,
        "half a picture": whole[: len(whole) // 2],
        "60,000 x 60,000 pixels": png(60_000, 60_000),
        "a WAV without samples": wav(0)[:44],
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "an MP4 header": b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2",
        "ELF": b"\x7fELF" + bytes(200),
    }


def bombs() -> dict[str, bytes]:
    """Small files that are very large once they are decoded."""
    import av
    import soundfile

    def video(size: int, frames: int) -> bytes:
        file, frame = io.BytesIO(), av.VideoFrame(size, size, "yuv420p")
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("h264", rate=100, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            for frame.pts in range(frames):
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return file.getvalue()

    silence = io.BytesIO()
    with soundfile.SoundFile(silence, "w", 8000, 1, format="FLAC") as sound:
        for _ in range(600):
            sound.buffer_write(bytes(2 * 60 * 8000), "int16")
    return {
        "a video of 8192 x 8192 pixels": video(8192, 2),
        "a video of 100,000 frames": video(16, 100_000),
        "ten hours of silence": silence.getvalue(),
    }


def png(width: int, height: int) -> bytes:
    """A black picture, whose data are compressed rows of zeros, at most 64 MiB of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes(min((width + 1) * height, 1 << 26)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(size: int) -> bytes:
    """A WAV file that claims `size` bytes of samples, and has 1,000."""
    file = io.BytesIO()
    file.write(b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + b"WAVEfmt ")
    file.write(
        struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16) + b"data" + struct.pack("<I", size) + bytes(1000)
    )
    return file.getvalue()


def speeches() -> Iterator[Fault]:
    """Texts that cannot be read aloud."""
    wrong: tuple[dict[str, Any], ...] = (
        {},
        {"input": ""},
        {"input": 5},
        {"input": "x" * 100_001},
        {"input": "x", "voice": "nobody"},
        {"input": "x", "response_format": "midi"},
        {"input": "x", "speed": 2},
        {"input": "x", "instructions": "sing"},
        {"input": "x", "stream_format": "x"},
        {"input": "x", "max_frames": 0},
        {"input": "x", "model": "tts-1"},
        {"input": "x", "unknown": 1},
        {"input": ["x"]},
    )
    for body in wrong:
        yield Fault(f"speech: {str(body)[:40]}", SPEECH, json.dumps(body).encode(), (400, 404))


def transcriptions() -> Iterator[Fault]:
    """Forms without a sound that can be written down."""
    json_type = {"Content-Type": "application/json"}
    yield Fault("transcription: JSON", TRANSCRIPTION, b"{}", (400, 415), json_type)
    yield Fault("transcription: no boundary", TRANSCRIPTION, b"x", (400, 415), {"Content-Type": "multipart/form-data"})
    sound = ('filename="a.wav"', wav(1000))
    forms: dict[str, dict[str, Any]] = {
        "no file": {"language": "en"},
        "an empty file": {"file": ('filename="a.wav"', b"")},
        "a text": {"file": ('filename="a.wav"', b"hello")},
        "a name that climbs": {"file": ('filename="../../etc/passwd"', b"x")},
        "an unknown format": {"file": sound, "response_format": "srt"},
        "an unknown language": {"file": sound, "language": "xx"},
        "a field that is a file": {"file": "hello"},
        "a picture": {"file": ('filename="a.wav"', png(8, 8))},
        "time stamps": {"file": sound, "timestamp_granularities[]": "word"},
        "another model": {"file": sound, "model": "whisper-1"},
    }
    for what, form in forms.items():
        body = b"".join(_part(name, value) for name, value in form.items()) + b"--edge--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=edge"}
        yield Fault(f"transcription: {what}", TRANSCRIPTION, body, (400, 404, 413), headers)


def _part(name: str, value: Any) -> bytes:
    extra, data = ("", value.encode()) if isinstance(value, str) else (f"; {value[0]}", value[1])
    return f'--edge\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"


def routes() -> Iterator[Fault]:
    """Paths, methods and callers that there are not."""
    paths = (
        "/v1",
        "/v1/embeddings",
        "/v1/completions",
        "/v1/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/static/../page.html",
        "/v1/chat/completions/",
        "/" + "x" * 5000,
        "/\x7f",
    )
    for path in paths:
        yield Fault(f"GET {path[:40]!r}", path, b"", (307, 400, 404, 405), {}, "GET")
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        yield Fault(f"{method} chat", CHAT, b"", (405,), {}, method)
    yield Fault("POST /health", "/health", b"", (405,))
    body = json.dumps({"messages": ASKED, "max_tokens": 2}).encode()
    for name, value in (("Origin", "https://evil.example"), ("Origin", "null"), ("Host", "evil.example")):
        yield Fault(f"{name}: {value}", CHAT, body, (403,), {"Content-Type": "application/json", name: value})


def sizes() -> Iterator[Fault]:
    """More than a server takes."""
    yield chat("a prompt of 2,000,000 letters", TOO_LARGE, messages=[{"role": "user", "content": "a b " * 500_000}])
    yield Fault("a body of 65 MiB", CHAT, b" " * (65 << 20), (413,))
    headers = {"Content-Type": "application/json", "X-Long": "x" * 200_000}
    # uvicorn answers with 400 and closes, which may reach the client as a reset connection.
    yield Fault("a header of 200,000 letters", CHAT, b"{}", (0, 400, 413, 431), headers)
