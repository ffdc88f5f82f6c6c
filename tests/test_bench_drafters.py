"""The comparison of drafters runs end to end, and its figures are those of the replies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.plan import KnownDrafters
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.ops import expert_parallel
from omni_jax.weights.drafters import load_drafter
from scripts.bench import drafters as bench_drafters
from scripts.bench.drafter_tables import figures
from scripts.bench.experts import count_experts
from scripts.bench.options import Drafters
from tests.parity import user

NEW = 30


@pytest.fixture(scope="module")
def compared(
    checkpoints: Callable[[str], Path], drafters: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Drafters, dict[str, bench_drafters.Way]]:
    folder = tmp_path_factory.mktemp("bench")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    lines = [
        {"turns": ["First question", "Second"]},
        {"prompt": "Another, longer question"},
        {"messages": user({"type": "image", "image": "red.png"}, "And a third, with a picture")},
    ]
    (folder / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    options = Drafters(
        model=checkpoints("small"),
        drafter=(str(drafters("dflash", "small")), str(drafters("eagle3", "small")), "oracle:0.2"),
        prompts=folder / "prompts.jsonl",
        new=NEW,
        batch=3,
        plot=folder / "plot.png",
        json=folder / "figures.json",
    )
    return options, {way.name: way for way in bench_drafters.compare(options)}


def test_every_way_says_the_same(compared: tuple[Drafters, dict[str, bench_drafters.Way]]) -> None:
    _, ways = compared
    assert [name.split(",")[-1] for name in ways][1:] == [" block of 5", " chain of 3", " tree of 59", "oracle:0.2"]
    assert all(way.differing == 0 for way in ways.values())
    plain, oracle = ways["plain"], ways["oracle:0.2"]
    assert all(way.tokens == plain.tokens for way in ways.values()) and plain.tokens > 2 * NEW
    assert sum(r.given.sum() for r in oracle.replies) == plain.tokens
    found = figures(oracle, plain)
    # Each of seven drafts is right with 0.8.
    assert found["acceptance"][0] == pytest.approx(0.8, abs=0.15) and 2.5 < found["tokens_per_round"] < 5.5
    assert found["verified"] == 8 * found["rounds"] and found["drafted"] == 7 * found["rounds"]
    low, high = found["tokens_per_round_interval"]
    assert low <= found["tokens_per_round"] <= high


def test_table_json_and_plot(
    compared: tuple[Drafters, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options, ways = compared
    monkeypatch.setattr(bench_drafters, "compare", lambda _: list(ways.values()))
    bench_drafters.report(options)
    printed = capsys.readouterr().out
    assert options.json is not None and options.plot is not None
    figures = json.loads(options.json.read_text())["figures"]
    assert all(name in printed for name in ways) and list(figures) == list(ways)
    assert f"{figures['oracle:0.2']['tokens_per_round']:.2f}" in printed
    assert options.plot.stat().st_size > 10_000


def watched(route: Callable, used: list[int]) -> Callable:
    """`route`, writing down how many experts were chosen."""

    def watching(*given: Any, **settings: Any) -> Any:
        routing = route(*given, **settings)
        jax.debug.callback(lambda ids: used.append(len(np.unique(ids))), routing.ids, ordered=True)
        return routing

    return watching


def test_experts_are_those_that_the_round_used(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni = omnis("odd")
    batch = omni.prepare([user("One"), user("Another one")])
    for kind, tree in (("dflash", None), ("eagle3", (2, 3))):
        drafts = KnownDrafters(omni.config).resolve_draft_plan(load_drafter(drafters(kind, "odd")), None, tree, False)
        assert drafts is not None
        parts = omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text
        engine = SpeculativeEngine(PlainEngine(*parts, Sampling()), drafts)
        counted = count_experts(engine, batch, Limits(9))
        used: list[int] = []
        monkeypatch.setattr(expert_parallel, "route", watched(expert_parallel.route, used))
        state = engine.prefill(batch, requests_for(batch, Limits(9), [0, 0])).state
        jax.clear_caches()
        used.clear()
        engine.dispatch(state, engine.plan_of(engine.lengths[0], 1))
        jax.effects_barrier()
        monkeypatch.undo()
        assert used == counted[0].tolist()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"prompt": "x"}\n{"answer": "y"}', "line 2: neither"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1"),
        ("", "no prompt"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=complaint):
        bench_drafters.read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        bench_drafters.read_prompts(tmp_path / "q.jsonl")


def test_what_would_fail_late_fails_first(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    settings: dict[str, Any] = {"model": tmp_path, "prompts": tmp_path / "p.jsonl"}
    with pytest.raises(InputError, match="error rate"):
        bench_drafters.report(Drafters(drafter=("oracle:abc",), **settings))
    with pytest.raises(InputError, match="folder does not exist"):
        Drafters(drafter=("oracle:0.3",), plot=tmp_path / "no" / "plot.png", **settings)
    with pytest.raises(InputError, match="no drafter"):
        Drafters(drafter=(), **settings)
