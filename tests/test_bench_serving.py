"""The benchmark of a server: figures of known times, a scripted server, and a real one."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation
from omni_jax.serve import sounds
from scripts.bench import serving
from scripts.bench.options import Serve
from scripts.bench.serving_client import Address, Answer, arrivals, ask_all, events, seconds_of
from scripts.bench.serving_prompts import make_questions, mixed
from scripts.bench.serving_tables import LATENCIES, TOTALS, figures, measured, playback, plot, rounds_of
from tests.helpers.serving import listening

URL = "http://127.0.0.1:1"
DELAY, GAP, PIECES = 0.05, 0.02, 4  # of the scripted server: until the first piece, and between pieces
PIECE_SAMPLES = 2400  # 0.1 s
KEY = "sk-test"


def _chunk(delta: dict, tokens: int, finish: str | None = None, **usage: Any) -> dict[str, Any]:
    return {
        "modality": "audio" if "audio" in delta else "text",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        "usage": {"prompt_tokens": 5, "completion_tokens": tokens, **usage},
    }


def _sound(samples: int = PIECE_SAMPLES) -> dict[str, Any]:
    return {"audio": {"id": "a", "data": base64.b64encode(bytes(2 * samples)).decode(), "transcript": ""}}


@dataclass
class Scripted:
    """A server whose answers follow from the words of the question; it counts how many it answers at once."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    clients: set[Any] = field(default_factory=set)
    now: int = 0
    most: int = 0

    def app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route

        async def models(request: Any) -> Any:
            allowed = request.headers.get("Authorization") == f"Bearer {KEY}"
            return JSONResponse({"data": [{"id": "scripted"}]} if allowed else {}, 200 if allowed else 401)

        async def chat(request: Any) -> Any:
            body = await request.json()
            self.bodies.append(body)
            self.clients.add(request.client)
            words = json.dumps(body["messages"]).lower()
            if "busy" in words:
                error = {"message": "All places are taken.", "type": "rate_limit_error", "code": None}
                return JSONResponse({"error": error}, 429)
            return StreamingResponse(self._events(words, "audio" in body.get("modalities", ())))

        return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])

    async def _events(self, words: str, spoken: bool) -> AsyncIterator[str]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            yield ": a comment\n\n" + _event(_chunk({"role": "assistant", "content": ""}, 0))
            await asyncio.sleep(60 if "hang" in words else DELAY)
            for i in range(PIECES):
                await asyncio.sleep(GAP if i else 0)
                yield _event(_chunk({"content": "word "}, 2 * i + 1))
                if spoken:
                    yield _event(_chunk(_sound(), 2 * i + 1))
                if "fail" in words:
                    yield f"data: {json.dumps({'error': {'message': 'Memory ran out.', 'code': 'out_of_memory'}})}\n\n"
                if "cut" in words or "fail" in words:
                    return
            details = {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 1}
            yield _event(_chunk({}, 2 * PIECES, "stop", completion_tokens_details=details)) + "data: [DONE]\n\n"
        finally:
            self.now -= 1


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    pytest.importorskip("uvicorn")
    script = Scripted()
    with listening(script.app()) as script.url:
        yield script


def _answer(kind: str = "text", sent: float = 1.0) -> Answer:
    """An answer of known times: pieces after 0.5, 0.7 and 1.1 s, with 2, 3 and 3 tokens; 2 rounds gave 7 of them."""
    answer = Answer(0, kind, sent=sent)
    answer.take(sent + 0.5, _chunk({"role": "assistant", "content": ""}, 0))
    for after, tokens in ((0.5, 2), (0.7, 5), (1.1, 8)):
        answer.take(sent + after, _chunk({"content": "a"}, tokens))
    details = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 1}
    answer.take(sent + 1.5, _chunk({}, 8, "stop", completion_tokens_details=details))
    return answer


def test_figures_of_known_times() -> None:
    found = measured(_answer())
    expected = {
        "first_token_seconds": [0.5], "between_pieces_seconds": [0.2, 0.4], "between_tokens_seconds": [0.6 / 6],
        "reply_seconds": [1.5], "tokens": [8], "prompt_tokens": [5], "rounds": [2], "accepted_length": [3.5],
    }  # fmt: skip
    assert found == {key: pytest.approx(values) for key, values in expected.items()}
    total = figures([_answer(sent=1.0), _answer(sent=3.0)])
    assert total["seconds"] == pytest.approx(3.5) and total["tokens_per_second"] == pytest.approx(16 / 3.5)
    assert total["requests_per_second"] == pytest.approx(2 / 3.5) and total["accepted_length"] == pytest.approx(3.5)
    gaps = total["latencies"]["between_pieces_seconds"]
    assert gaps["50"] == pytest.approx(0.3) and gaps["99"] == pytest.approx(0.4) and gaps["values"] == 4


def test_what_is_not_measured_is_absent() -> None:
    answer = Answer(0, "text")
    for now in (0.5, 1.0):
        answer.take(now, {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})
    assert set(measured(answer)) == {"reply_seconds", "first_token_seconds", "between_pieces_seconds"}
    answer.take(1.0, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 6}})
    assert measured(answer)["between_tokens_seconds"] == [0.1], "from the pieces, if tokens are counted at the end"
    assert rounds_of({"completion_tokens": 6, "completion_tokens_details": {"accepted_prediction_tokens": 0}}) is None


def test_speech_of_known_times() -> None:
    answer = Answer(0, "speech", sent=1.0)
    for now in (2.0, 2.05, 2.5):
        answer.take(now, _chunk(_sound(), 1))
    found = measured(answer)
    assert found["first_audio_seconds"] == [1.0] and found["audio_seconds"] == pytest.approx([0.3])
    assert found["real_time_factor"] == pytest.approx([1.5 / 0.3])
    assert found["underruns"] == [1] and found["late_seconds"] == pytest.approx([0.3])
    assert "first_token_seconds" not in found


def test_a_player_that_waits_for_nothing() -> None:
    assert playback([(5.0, 1.0), (5.9, 1.0), (6.9, 0.1)]) == (0, 0.0)
    # After a late piece, the next one counts from there.
    assert playback([(0.0, 1.0), (2.0, 1.0), (3.5, 1.0)]) == (2, pytest.approx(1.5))


def test_sound_of_other_servers() -> None:
    wave = np.zeros(PIECE_SAMPLES, np.float32)
    assert seconds_of(sounds.whole(wave, "wav")) == seconds_of(bytes(2 * PIECE_SAMPLES)) == 0.1
    answer = Answer(0, "speech")
    data = base64.b64encode(sounds.whole(wave, "wav")).decode()
    answer.take(1.0, {"modality": "audio", "choices": [{"delta": {"content": data}, "finish_reason": None}]})
    assert answer.sounds == [(1.0, 0.1)] and not answer.texts


def test_events_are_read_however_they_are_cut() -> None:
    text = b': hello\r\n\r\ndata: {"a": "\xc3\xa9"}\r\n\r\ndata:{"a": 2}\n\ndata: [DONE]\n\n'

    async def read(size: int) -> list[Any]:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(text), size):
                yield text[start : start + size]

        return [event async for event in events(pieces())]

    assert all(asyncio.run(read(size)) == [{"a": "é"}, {"a": 2}] for size in (1, 7, len(text)))


def test_arrivals() -> None:
    times = arrivals(4000, 8.0, 3)
    assert times[0] == 0 and (np.diff(times) > 0).all() and np.array_equal(times, arrivals(4000, 8.0, 3))
    gaps = np.diff(times)
    # Of a Poisson process: the mean of the gaps is their standard deviation.
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.1) and gaps.std() == pytest.approx(1 / 8, rel=0.1)
    assert not np.array_equal(times, arrivals(4000, 8.0, 4)) and not arrivals(3, None, 0).any()


def test_the_mix_has_its_weights() -> None:
    kinds = mixed("text=4,image=1,speech", 60, 0)
    assert [kinds.count(kind) for kind in ("text", "image", "speech")] == [40, 10, 10]
    assert kinds == mixed("text=4,image=1,speech", 60, 0) != mixed("text=4,image=1,speech", 60, 1)
    assert mixed("text=4,image=1", 3, None) == ["text", "image", "text"]
    for wrong in ("", "text=0", "smell=1", "text=1,text=2", "text=x", "text=-1"):
        with pytest.raises(InputError, match="give kinds"):
            mixed(wrong, 1, 0)


def test_made_media_can_be_read_and_differ() -> None:
    warm_up, questions = make_questions(Serve(url=URL, mix="image,audio,video", count=6, warm_up=3))
    chats = [json.dumps(one.messages) for one in [*warm_up, *questions]]
    assert len(set(chats)) == 9 and [one.kind for one in warm_up] == ["image", "audio", "video"]
    for one in [*warm_up, *questions]:
        (medium,) = read_conversation(one.messages).media
        assert medium.kind == one.kind and len(medium.source) > 500


def test_prompts_of_a_dataset(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "flower.jpg").write_bytes((data_dir / "flower.jpg").read_bytes())
    rows = [{"question_id": 81, "turns": ["First", "Second"]}, {"prompt": "See", "image": "flower.jpg"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Serve(url=URL, prompts=tmp_path / "rows.jsonl", warm_up=1)
    warm_up, questions = make_questions(options)
    assert questions[0].messages == [{"role": "user", "content": "First"}], "the first turn alone"
    image, text = questions[1].messages[0]["content"]
    encoded = base64.b64encode((data_dir / "flower.jpg").read_bytes()).decode()
    assert image == {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    assert text["text"] == "See" and warm_up[0].messages[0]["content"][0]["text"] == "first"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"image": "flower.jpg"}\n')
    with pytest.raises(InputError, match="no question"):
        make_questions(options)


def test_bodies() -> None:
    options = Serve(url=URL, mix="speech", count=1, new=9, frames=7, seed=2, ignore_eos=True)
    body = make_questions(options)[1][0].body(options, "m")
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True} and body["stream"]
    assert (body["max_tokens"], body["max_frames"], body["seed"], body["ignore_eos"]) == (9, 7, 2, True)
    assert body["modalities"] == ["text", "audio"] and body["audio"] == {"format": "pcm16"}


@pytest.mark.parametrize(
    "wrong, complaint",
    [({"url": None}, "either"), ({"model": Path("nano")}, "either"), ({"rate": 0.0}, "above 0"),
     ({"rate": float("nan")}, "above 0"), ({"concurrency": 0}, "above 0"), ({"count": 0}, "at least"),
     ({"compare_generate": True}, "started here"), ({"plot": Path("no/such/a.png")}, "folder")],
)  # fmt: skip
def test_options_that_give_no_figures_are_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        replace(Serve(url=URL), **wrong)


def test_addresses() -> None:
    assert Address.read("http://a:1/v1/") == Address.read("http://a:1") and Address.read("https://a/x/v1").path == "/x"
    assert Address.read("https://a").port == 443 and "secret" not in repr(Address.read("http://a", "secret"))
    for wrong in ("a:1", "ftp://a", "http://", "http://a:x"):
        with pytest.raises(InputError, match="no address"):
            Address.read(wrong)
    with pytest.raises(InputError, match="does not answer"):
        serving.report(Serve(url=URL, count=1))


def _run(tmp_path: Path, capsys: pytest.CaptureFixture, **options: Any) -> tuple[str, dict[str, Any]]:
    """What the benchmark prints, and the figures of its JSON."""
    file = tmp_path / "figures.json"
    serving.report(Serve(json=file, **options))
    assert KEY not in file.read_text()
    return capsys.readouterr().out, json.loads(file.read_text())["figures"]


def test_a_scripted_server(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = {"mix": "text=2,speech=1", "count": 9, "rate": None, "concurrency": 3, "warm_up": 2, "api_key": KEY}
    with scripted() as script:
        printed, found = _run(tmp_path, capsys, url=script.url, plot=tmp_path / "plot.png", **asked)
    assert len(script.bodies) == 11 and script.most == 3 and len(script.clients) <= 2 + 3
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    total = found["all"]
    assert (total["requests"], total["completed"], total["failed"], total["tokens"]) == (9, 9, {}, 72)
    assert total["audio_seconds"] == pytest.approx(3 * PIECES * 0.1) and total["accepted_length"] == pytest.approx(
        7 / 3
    )
    for row in found["rows"]:
        # The server sleeps at least so long, and no interval is longer than one that holds it.
        assert (
            DELAY < row["first_token_seconds"] < row["reply_seconds"] < row["ended"] <= total["seconds"] + row["sent"]
        )
        assert row["reply_seconds"] >= DELAY + GAP * (PIECES - 1)
        # A client that is late with the first tokens is not early with the last ones.
        later = row["between_tokens_seconds"] * (2 * PIECES - 1)
        assert row["first_token_seconds"] + later > DELAY + GAP * (PIECES - 1)
        assert ("first_audio_seconds" in row) == (row["kind"] == "speech")
    # Three rounds of three at a time.
    assert total["seconds"] > 3 * (DELAY + GAP * (PIECES - 1))
    assert total["tokens_per_second"] * total["seconds"] == pytest.approx(72)
    _check_table(printed, found)


def _check_table(printed: str, found: dict[str, Any]) -> None:
    """The table shows the figures of the JSON, each that is there and no other."""
    blocks = printed.split("\n\n")
    for label, key, scale, form in TOTALS:
        shown = [line for line in blocks[0].splitlines() if line[:30].strip() == label]
        assert [line[30:].strip() for line in shown] == (
            [format(found["all"][key] * scale, form)] if key in found["all"] else []
        )
    for block, kind in zip(blocks[1:], [found["all"], *found["kinds"].values()], strict=True):
        for label, key, scale, form in LATENCIES:
            shown = [line[30:].split() for line in block.splitlines() if line[:30].strip() == label]
            row = kind["latencies"].get(key)
            values = [] if row is None else [[format(row[p] * scale, form) for p in ("50", "90", "99")]]
            assert [line[:3] for line in shown] == values


def test_failures_are_counted_by_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("busy", "fine", "fail", "busy", "cut", "hang")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    with scripted() as script:
        printed, found = _run(
            tmp_path,
            capsys,
            url=f"{script.url}/v1",
            prompts=tmp_path / "rows.jsonl",
            warm_up=0,
            timeout=5.0,
            api_key=KEY,
        )
    total = found["all"]
    reasons = ("status 429 rate_limit_error", "error in the stream out_of_memory", "ended without a finish reason",
               "no end within 5 s")  # fmt: skip
    assert total["failed"] == dict(zip(reasons, (2, 1, 1, 1), strict=True)) and total["completed"] == 1
    assert "failed: 2 by status 429 rate_limit_error (All places are taken.)" in printed
    assert all(f"by {reason}" in printed for reason in reasons)
    assert total["tokens"] == 2 * PIECES, "what failed counts nowhere"
    assert [row["number"] for row in found["rows"] if "failure" in row] == [0, 2, 3, 4, 5]


def test_no_figures_of_a_run_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "busy"}\n')
    with scripted() as script:
        options = {"url": script.url, "prompts": tmp_path / "rows.jsonl", "api_key": KEY}
        with pytest.raises(InputError, match="warm-up was answered: status 429"):
            _run(tmp_path, capsys, **options)
        with pytest.raises(InputError, match="status 401"):
            _run(tmp_path, capsys, **options | {"api_key": "sk-wrong"})
        printed, found = _run(tmp_path, capsys, **options, warm_up=0, plot=tmp_path / "plot.png")
    assert found["all"]["latencies"] == {} and "tokens_per_second" not in found["all"]
    assert "0 of 1" in printed and "%" not in printed.splitlines()[-1]


def test_a_plot_without_counts_has_one_panel(tmp_path: Path) -> None:
    from PIL import Image

    counted, uncounted = _answer(), replace(_answer(), counts=[])
    plot([counted], tmp_path / "both.png")
    plot([uncounted], tmp_path / "one.png")
    widths = [Image.open(tmp_path / name).width for name in ("both.png", "one.png")]
    assert widths[0] == 2 * widths[1]


@pytest.mark.slow
def test_a_server_that_is_started(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"mix": "text=2,image=1,speech=1", "count": 4, "new": 8, "frames": 4, "concurrency": 2, "warm_up": 4}
    printed, found = _run(
        tmp_path, capsys, model=checkpoints("tiny"), rate=None, ignore_eos=True, compare_generate=True, **options
    )
    total = found["all"]
    assert total["completed"] == 4 and total["tokens"] == 32 and 3 * 0.08 < total["audio_seconds"] <= 4 * 0.08
    assert total["of_generate"] == pytest.approx(total["tokens_per_second"] / total["generate_tokens_per_second"])
    assert total["compiled"] >= 0 and total["generate_compiled"] >= 0 and found["model"] == checkpoints("tiny").name
    _check_table(printed, found)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended before it listened: .*no-such-model"):
        serving.report(Serve(model=tmp_path / "no-such-model", count=1))


def test_a_kept_connection_that_the_server_closed_is_no_failure() -> None:
    """The second request goes over a new one; where a new one is closed too, the request has failed."""
    event = json.dumps(_chunk({"content": "Hi"}, 1, "stop"))
    data = f"data: {event}\n\n".encode()
    answer, taken = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        if len(taken) < 3:
            writer.write(answer)
            await reader.read(1)  # The next request, which gets no answer.
        writer.close()

    async def ask() -> list[str | None]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        async with server:
            return [one.failure for one in await ask_all(address, [("text", {})] * 3, [0.0] * 3, 1, 10)]

    assert asyncio.run(ask()) == [None, None, "connection lost: IncompleteReadError"] and len(taken) == 3
