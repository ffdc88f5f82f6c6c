"""Prompts that run in pieces: the state of the whole prompt, whatever holds others up no longer than a piece."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import PlainEngine, Prefilled
from omni_jax.decode.limits import Limits
from omni_jax.decode.pieces import Piece, pieces_of
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import Request, requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.helpers.slots import assert_same, in_order
from tests.parity import audio_part, image_part, user, video_part

MIXED = user(
    "Some words first.", image_part(90, 90, 5), "and more", audio_part(1.2, 5), video_part(4, 64, 64, 2.0, 6), "Now?"
)
PIECE = 16


def test_pieces_of_a_prompt() -> None:
    assert pieces_of(0, 40, 16) == [Piece(0, 16, 16), Piece(16, 32, 16), Piece(32, 48, 8)]
    assert pieces_of(0, 36, 16)[-1] == Piece(32, 36, 4) and pieces_of(0, 32, 16)[-1] == Piece(16, 32, 16)
    assert pieces_of(5, 9, 16) == [Piece(5, 9, 4)] and pieces_of(5, 6, 16) == [Piece(5, 6, 1)]


def engine_of(omni: Omni, piece: int | None = PIECE, sampling: Sampling | None = None) -> PlainEngine:
    parts = omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text
    return PlainEngine(*parts, sampling or Sampling(), piece=piece)


def both(omni: Omni, batch: Batch, taps: tuple[int, ...], sampling: Sampling) -> tuple[Prefilled, Prefilled, int]:
    """A prompt run at once and in pieces, and the number of steps that the pieces took."""
    requests = requests_for(batch, Limits(9), [0], sampling)
    whole = engine_of(omni, None, sampling).prefill(batch, requests, taps)
    *steps, last = engine_of(omni, PIECE, sampling).prefill_in_pieces(batch, requests, taps)
    assert last is not None and all(step is None for step in steps)
    return whole, last, len(steps)


@pytest.mark.parametrize("messages", [user("word " * 50), MIXED], ids=["text", "media"])
def test_pieces_give_the_state_of_the_whole_prompt(messages: list[dict], omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    batch, taps = omni.prepare(messages), (1, omni.config.thinker.text.num_layers)
    T = batch.token_ids.shape[1]
    whole, pieced, steps = both(omni, batch, taps, Sampling(repetition_penalty=1.3, logprobs=20))
    assert steps >= -(-T // PIECE) - 1 > 2
    np.testing.assert_array_equal(whole.chunk.read()[..., 0], pieced.chunk.read()[..., 0])
    scores = [one.chunk.read().view(np.float32)[0, 0, 0, 22:] for one in (whole, pieced)]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)
    assert whole.tapped is not None and pieced.tapped is not None
    for ours, theirs in ((pieced.tapped, whole.tapped), (pieced.state.cache.k, whole.state.cache.k)):
        axis = 2 if ours.ndim == 4 else 3
        a, b = (np.moveaxis(np.asarray(x), axis, 0)[:T] for x in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    for name in ("token", "done", "remaining", "seen"):
        ours, theirs = (np.asarray(getattr(one.state.rows, name)) for one in (pieced, whole))
        np.testing.assert_array_equal(ours, theirs)
    assert pieced.state.cache.length.tolist() == [T]
    np.testing.assert_array_equal(pieced.state.rope_delta, whole.state.rope_delta)


def test_a_short_prompt_runs_as_today(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = engine_of(omnis("small"), 64), omnis("small").prepare(user("Short."))
    whole: list[int] = []
    prefill_for = PlainEngine.prefill_for
    monkeypatch.setattr(PlainEngine, "prefill_for", lambda *given: whole.append(1) or prefill_for(*given))
    (prefilled,) = engine.prefill_in_pieces(batch, requests_for(batch, Limits(3), [0]))
    assert prefilled is not None and whole == [1]


ASKED = [(user("One."), 40), (MIXED, 12), (user("word " * 70), 20), (user("Two."), 30), (MIXED, 9)]


@pytest.mark.parametrize("kind", [None, "dflash", "eagle3"])
def test_replies_are_those_of_whole_prompts(
    kind: str | None, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafting = omnis("small"), {}
    if kind is not None:
        drafting = {"drafter": load_drafter(drafters(kind, "small")), "draft_tokens": 3}
    settings: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.2, "stop_ids": ()}
    if kind is None:
        settings |= {"speech": True, "max_frames": 10}
    prompts = [Prompt(omni.prepare(messages), i, new) for i, (messages, new) in enumerate(ASKED)]
    want = in_order(omni.generate_many(prompts, slots=3, **drafting, **settings))
    got = in_order(omni.generate_many(prompts, slots=3, piece_tokens=PIECE, **drafting, **settings))
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs, spoken=kind is None)


def test_others_write_between_two_pieces(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    omni, order = omnis("small"), []
    engine = engine_of(omni)
    receive = PlainEngine.receive

    def receiving(self: PlainEngine, chunk: Any, rows: Any) -> None:
        order.append(int((chunk.read()[0, ..., 0] >= 0).sum()))
        receive(self, chunk, rows)

    pieces = PlainEngine.pieces_for

    def in_pieces(*given: Any) -> Any:
        for prefilled in pieces(*given):
            order.append("piece")
            yield prefilled

    monkeypatch.setattr(PlainEngine, "receive", receiving)
    monkeypatch.setattr(PlainEngine, "pieces_for", in_pieces)
    batches = [omni.prepare(user("One.")), omni.prepare(user("word " * 50))]
    admissions = [Admission(b, requests_for(b, Limits(n), [0])) for b, n in zip(batches, (200, 5), strict=True)]
    Batching(engine, 2, waiting=iter(admissions)).finish()
    first = order.index("piece", 1)
    long = order[first : first + 12]
    assert long.count("piece") > 3 and all(one == "piece" or one <= 9 for one in long[:8])
    assert all(a != b for a, b in pairwise(long) if a == "piece"), "one at a time"


def test_a_prompt_that_is_cancelled_between_two_pieces(omnis: Callable[[str], Omni]) -> None:
    omni, asked = omnis("small"), []
    long = Prompt(omni.prepare(user("word " * 70)), 0, 50, cancelled=lambda: asked.append(1) or len(asked) > 1)
    other = Prompt(omni.prepare(user("One.")), 0, 60)
    want = omni.generate(user("One."), max_new_tokens=60, stop_ids=())
    settings: dict[str, Any] = {"slots": 2, "piece_tokens": PIECE, "stop_ids": (), "logprobs": 1}
    replies = in_order(omni.generate_many([other, long, replace(other, seed=1)], **settings))
    assert [reply.stats["finish_reason"] for reply in replies] == ["length", "cancelled", "length"]
    assert replies[1].token_ids == [] and len(asked) == 2
    assert replies[0].token_ids == replies[2].token_ids == want.token_ids
    # Nothing else is left to do when it is cancelled.
    asked.clear()
    short = replace(other, max_new_tokens=2)
    replies = in_order(omni.generate_many([short, long], **settings))
    assert [reply.stats["finish_reason"] for reply in replies] in (["length", "cancelled"], ["length", "length"])


def test_programs_for_pieces_are_few(omnis: Callable[[str], Omni]) -> None:
    from omni_jax.decode.text import prefill, read_piece

    programs: list[Any] = [prefill, read_piece]
    omni = omnis("small")
    jax.clear_caches()
    for words in (20, 25, 31, 36, 42):
        batch = omni.prepare(user("word " * words))
        requests: list[Request] = requests_for(batch, Limits(3), [0])
        list(engine_of(omni).prefill_in_pieces(batch, requests))
    assert programs[1]._cache_size() == 1 and programs[0]._cache_size() <= 3
