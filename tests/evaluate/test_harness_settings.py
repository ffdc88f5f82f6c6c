"""Every setting of the harness's model is shown to change what it says it changes."""

import inspect
from pathlib import Path
from typing import Any

import pytest

import omni_jax
from omni_jax.errors import InputError
from omni_jax.evaluate.context import seed_of
from omni_jax.evaluate.loglikelihood import Scored
from omni_jax.weights import checkpoint
from tests.evaluate.stub import StubOmni

pytest.importorskip("lm_eval")


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def stub(model: Path, monkeypatch: pytest.MonkeyPatch) -> StubOmni:
    stub = StubOmni(checkpoint.read_config(model))
    stub.processor = type("Processor", (), {"tokenizer": Letters()})()  # type: ignore[assignment]
    stub.loaded = []  # type: ignore[attr-defined]

    def load(path: str, **settings: Any) -> StubOmni:
        stub.loaded.append({"path": path, **settings})  # type: ignore[attr-defined]
        return stub

    monkeypatch.setattr(omni_jax, "load", load)
    return stub


def ask(model: Any, *settings: dict, context: str = "Once upon") -> list[str]:
    from lm_eval.api.instance import Instance

    instances = [Instance("generate_until", {}, (context, kw), i) for i, kw in enumerate(settings)]
    return model.generate_until(instances, disable_tqdm=True)


def lm(**settings: Any) -> Any:
    from omni_jax.evaluate.harness import OmniLM

    return OmniLM(**{"path": "ckpt", **settings})


def test_how_the_model_is_loaded(stub: StubOmni) -> None:
    lm(), lm(path="other", dtype="bfloat16", mesh="expert=4+data=2")
    assert stub.loaded == [  # type: ignore[attr-defined]
        {"path": "ckpt", "mesh": None, "dtype": None, "parts": ("thinker",)},
        {"path": "other", "mesh": "expert=4,data=2", "dtype": "bfloat16", "parts": ("thinker",)},
    ]
    assert lm(path="a/b").tokenizer_name == "a__b"


@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_template_is_told_whether_to_think(thinking: bool | None, stub: StubOmni) -> None:
    asked = []
    template = type("Template", (), {"render": lambda self, *given, **named: asked.append(named) or ""})()
    stub.processor.template = template  # type: ignore[attr-defined]
    lm(enable_thinking=thinking).apply_chat_template([{"role": "user", "content": "Hi"}])
    assert asked == [{"add_generation_prompt": True, "enable_thinking": thinking}]


def test_batch_size_is_slots_and_rows(stub: StubOmni, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_jax.evaluate import harness

    rows = []

    def weigh(omni: Any, asked: list, rows: int, seen: Any) -> list[Scored]:
        widths.append(rows)
        return [Scored(-1.0, True, 1) for _ in asked]

    widths: list[int] = rows
    monkeypatch.setattr(harness, "log_likelihoods", weigh)
    for given in (3, "5", None):
        model = lm() if given is None else lm(batch_size=given)
        ask(model, {})
        model._loglikelihood_tokens([(None, [1], [2])], disable_tqdm=True)
    assert [call["slots"] for call in stub.asked["generate_many"]] == widths == [3, 5, 8]


def test_lengths(stub: StubOmni) -> None:
    limit = stub.config.thinker.text.max_position_embeddings
    assert lm().max_length == limit and lm(max_length=50).max_length == 50 and lm(max_length=10**6).max_length == limit
    ask(lm(max_gen_toks=7), {}, {"max_gen_toks": 3}), ask(lm(), {})
    assert [prompt.max_new_tokens for prompt in stub.prompts] == [7, 3, 256]
    stub.prompts.clear()
    ask(lm(max_length=10, max_gen_toks=4), {}, context="abcdefghij")
    assert Letters().decode(stub.prompts[0].batch.token_ids[0]) == "efghij", "the end of what fits is kept"


def test_seeds(stub: StubOmni) -> None:
    ask(lm(), {}, {}), ask(lm(seed=4), {})
    want = [seed_of(0, "Once upon", 0), seed_of(0, "Once upon", 1), seed_of(4, "Once upon", 0)]
    assert [prompt.seed for prompt in stub.prompts] == want


@pytest.mark.parametrize("name, value", [
    ("temperature", 0.5), ("top_k", 7), ("top_p", 0.75), ("min_p", 0.125), ("repetition_penalty", 1.5),
])  # fmt: skip
def test_what_a_task_says_of_drawing(name: str, value: Any, stub: StubOmni) -> None:
    ask(lm(), {}, {"do_sample": True, "temperature": 0.9, name: value})
    plain, drawn = sorted(stub.asked["generate_many"], key=len)
    assert plain.get(name, 0) != value == drawn[name]


def test_greedy_unless_a_task_draws(stub: StubOmni) -> None:
    for settings in ({}, {"do_sample": False}, {"do_sample": False, "temperature": 0.9}):
        ask(lm(), settings)
    assert [call.get("temperature", 0.0) for call in stub.asked["generate_many"]] == [0.0] * 3


def test_stop_strings(stub: StubOmni) -> None:
    assert ask(lm(), {"until": ["upon"]}, {"until": "ce"}, {}) == ["Once ", "On", "Once upon"]
    until, other, none = (prompt.ends for prompt in stub.prompts)
    written = Letters().encode("once up")
    assert until and not until(written) and until([*written, *Letters().encode("on")]), "all that was written is asked"
    assert other and other(written) and none and not none(written)


def test_what_has_no_meaning_here_is_taken_and_unused(stub: StubOmni) -> None:
    model = lm(device="cuda:0", max_batch_size=64)
    ask(model, {"num_beams": 1, "use_cache": True})
    assert stub.asked["generate_many"] == [{"slots": 8}] or stub.asked["generate_many"][0]["slots"] == 8


@pytest.mark.parametrize("settings, why", [
    ({"batch_size": "auto"}, "batch_size 'auto'; give a whole number"),
    ({"batch_size": 0}, "batch_size 0; give a whole number"),
    ({"batch_size": "0"}, "batch_size '0'; give a whole number"),
    ({"batch_size": -3}, "batch_size -3; give a whole number"),
    ({"batch_size": 2.5}, "batch_size 2.5"),
    ({"batch_size": None}, "batch_size None"),
    ({"max_length": 0}, "max_length 0; give a whole number"),
    ({"max_length": -1}, "max_length -1; give a whole number"),
    ({"max_length": "long"}, "max_length 'long'; give a whole number"),
    ({"max_gen_toks": 0}, "max_gen_toks 0; give a whole number"),
    ({"max_gen_toks": 1.5}, "max_gen_toks 1.5; give a whole number"),
    ({"seed": -1}, "seed -1; give a whole number"),
    ({"seed": "x"}, "seed 'x'; give a whole number"),
    ({"path": 5}, "path is of type int"),
    ({"mesh": 4}, "mesh is 4"),
], ids=str)  # fmt: skip
def test_settings_that_cannot_be(settings: dict, why: str, stub: StubOmni) -> None:
    with pytest.raises(InputError, match=why):
        lm(**settings)
    assert not stub.loaded, "before the weights are read"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kwargs, why", [
    ({"num_beams": 4}, "num_beams"),
    ({"typical_p": 0.5}, "'typical_p' is unknown"),
    ({"max_gen_toks": 10**12}, "max_gen_toks is 1000000000000"),
])  # fmt: skip
def test_what_a_task_cannot_ask(kwargs: dict, why: str, stub: StubOmni) -> None:
    with pytest.raises(InputError, match=why):
        ask(lm(), kwargs)


def test_no_setting_is_without_a_test() -> None:
    from omni_jax.evaluate.harness import IGNORED, SAMPLING, OmniLM

    assert set(inspect.signature(OmniLM).parameters) == {
        *("path", "batch_size", "max_length", "max_gen_toks", "dtype", "mesh", "seed", "enable_thinking"),
        *("device", "max_batch_size"),
    }
    assert {*SAMPLING, *IGNORED} == {
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("do_sample", "until", "max_gen_toks", "num_beams", "use_cache"),
    }
