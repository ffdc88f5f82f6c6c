"""A model on a mesh says what it says on one device, and each device holds its own pieces alone."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from convert import convert_checkpoint
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.decode.rows import insert
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import decode_chunk, forward, prefill
from omni_jax.errors import InputError
from omni_jax.evaluate import loglikelihood
from omni_jax.evaluate.loglikelihood import log_likelihoods, prepare_choices
from omni_jax.loading import load
from omni_jax.models.param import Declaration, bind
from omni_jax.omni import Omni
from omni_jax.ops import expert_parallel
from omni_jax.ops.cache import lay_over
from omni_jax.sharding import constrain, make_mesh, mesh_name, place_rows, round_up_rows, sharding_for, split_over
from omni_jax.weights.drafters import load_drafter
from omni_jax.weights.mesh_text import parse_mesh
from tests.helpers.experts import collectives
from tests.parity import audio_part, image_part, user

WORDS = [user(text) for text in ("Why?", "One two", "The sky is blue.", "Go on", "a b c", "Tell me", "x", "And then?")]
MEDIA = [user("Just words."), user(image_part(60, 90), "What?"), user(audio_part(1.2), "Who?"), user("Four rows.")]
MESHES = ("data=1", "data=8", "expert=2", "expert=4", "expert=8", "expert=4,data=2", "expert=4,tensor=2")


@pytest.fixture(scope="module")
def on_mesh(checkpoints: Callable[[str], Path]) -> Callable[[str], Omni]:
    """`on_mesh("expert=4")` is the whole "tiny" model on that mesh of the 8 devices."""

    @cache
    def on(text: str) -> Omni:
        return load(checkpoints("tiny"), mesh=make_mesh(**parse_mesh(text)))

    return on


@pytest.fixture(scope="module")
def said(omnis: Callable[[str], Omni]) -> list[list[int]]:
    """What one device says to `WORDS`."""
    return [reply.token_ids for reply in omnis("tiny").generate(WORDS, max_new_tokens=8, stop_ids=())]


@pytest.mark.parametrize("mesh", MESHES)
def test_replies_equal_those_of_one_device(mesh: str, on_mesh: Callable, said: list[list[int]]) -> None:
    omni = on_mesh(mesh)
    assert [reply.token_ids for reply in omni.generate(WORDS, max_new_tokens=8, stop_ids=())] == said
    experts = omni.params["thinker"]["layers"]["moe"]
    sizes = parse_mesh(mesh)
    for name in ("gate_up", "down"):
        pieces = {shard.data.nbytes for shard in experts[name].addressable_shards}
        assert pieces == {experts[name].nbytes // (sizes.get("expert", 1) * sizes.get("tensor", 1))}


def test_rows_that_the_mesh_does_not_divide(on_mesh: Callable, said: list[list[int]]) -> None:
    omni = on_mesh("expert=4,tensor=2")
    got = omni.generate(WORDS[2:5], max_new_tokens=8, stop_ids=(), temperature=0.0)
    assert [reply.token_ids for reply in got] == said[2:5]
    assert omni.generate(WORDS[0], max_new_tokens=8, stop_ids=()).token_ids == said[0]


def test_slots_that_the_mesh_does_not_divide(on_mesh: Callable, said: list[list[int]]) -> None:
    omni, text = on_mesh("expert=8"), on_mesh("expert=8").config.thinker.text
    engine = PlainEngine(omni.params["thinker"], omni.declarations["thinker"], text, Sampling())
    batches = [omni.prepare(one) for one in WORDS]
    waiting = [Admission(batch, requests_for(batch, Limits(8), [0])) for batch in batches]
    batching = Batching(engine, round_up_rows(12, omni.meshes["thinker"]), waiting=iter(waiting))
    batching.finish()
    assert [admission.requests[0].token_ids for admission in waiting] == said
    state = batching.state
    one = text.num_layers * text.num_kv_heads * state.cache.capacity * text.head_dim * 4
    for buffer in (state.cache.k, state.cache.v):
        assert [shard.data.nbytes for shard in buffer.addressable_shards] == [2 * one] * 8, "16 rows over 8 devices"
    # Writing a prompt's row moves no cache between devices, nor copies it.
    alone = engine.prefill(batches[0], requests_for(batches[0], Limits(8), [0])).state
    writing = insert.lower(state, alone, np.int32(3)).compile()
    assert max([0, *collectives(writing).values()]) < one
    assert writing.memory_analysis().temp_size_in_bytes < one


HEARD = [*MEDIA, *WORDS[:4]]
ALOUD: dict[str, Any] = {
    "max_new_tokens": 6,
    "stop_ids": (),
    "speech": True,
    "speech_temperature": 0.0,
    "max_frames": 3,
}


@pytest.fixture(scope="module")
def heard(omnis: Callable[[str], Omni]) -> tuple[np.ndarray, list[Any]]:
    """What one device thinks of `HEARD`, logits of what is no padding, and what it says, aloud."""
    omni = omnis("tiny")
    batch = omni.prepare(HEARD)
    return np.asarray(omni.logits(batch))[batch.mask], omni.generate(HEARD, **ALOUD)


def same_speech(got: list[Any], want: list[Any]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_allclose(ours.audio, theirs.audio, atol=1e-3)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_part_says_what_it_says_on_one_device(
    mesh: str, on_mesh: Callable, drafters: Callable, heard: tuple, said: list[list[int]]
) -> None:
    """Thinker with all media, Talker and vocoder, DFlash in a spoken reply, EAGLE-3 in a written one."""
    omni, (logits, spoken) = on_mesh(mesh), heard
    batch = omni.prepare(HEARD)
    np.testing.assert_allclose(np.asarray(omni.logits(batch))[batch.mask], logits, atol=5e-4, rtol=0)
    dflash, eagle3 = (load_drafter(drafters(kind, "tiny")) for kind in ("dflash", "eagle3"))
    same_speech(omni.generate(HEARD, drafter=dflash, draft_tokens=3, **ALOUD), spoken)
    chain = omni.generate(WORDS, max_new_tokens=8, stop_ids=(), drafter=eagle3, draft_tokens=3)
    assert [reply.token_ids for reply in chain] == said


def test_rows_that_are_exchanged(on_mesh: Callable, heard: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """As larger batches are: rows travel to the shards of their experts."""
    omni, ways = on_mesh("expert=8"), []
    exchange = expert_parallel.exchanged
    monkeypatch.setattr(expert_parallel, "EXCHANGE_ROWS", 0)
    monkeypatch.setattr(expert_parallel, "exchanged", lambda *a: ways.append(a[0].shape) or exchange(*a))
    forward.clear_cache()
    batch = omni.prepare(HEARD)
    np.testing.assert_allclose(np.asarray(omni.logits(batch))[batch.mask], heard[0], atol=5e-4, rtol=0)
    forward.clear_cache()
    assert ways


def test_parts_on_devices_of_their_own(checkpoints: Callable, tmp_path: Path, heard: tuple) -> None:
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ours")
    omni = load(tmp_path / "ours", mesh="thinker:expert=4;talker:expert=2,tensor=2")
    where = {part: [d.id for d in omni.meshes[part].devices.flat] for part in omni.meshes}
    assert where == {"thinker": [0, 1, 2, 3], "talker": [4, 5, 6, 7], "code2wav": [4, 5, 6, 7]}
    for part, params in omni.params.items():
        assert {d.id for x in jax.tree.leaves(params) for d in x.devices()} == set(where[part])
    same_speech(omni.generate(HEARD, **ALOUD), heard[1])


def test_trees(on_mesh: Callable, omnis: Callable, drafters: Callable, said: list) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (), "draft_tree": (2, 3), "draft_tokens": 4}
    asked["drafter"] = load_drafter(drafters("eagle3", "tiny"))
    got, want = (omni.generate(WORDS[:4], **asked) for omni in (on_mesh("expert=4,tensor=2"), omnis("tiny")))
    assert [reply.token_ids for reply in got] == said[:4]
    assert [reply.stats["rounds"] for reply in got] == [reply.stats["rounds"] for reply in want]


def test_a_drafter_on_a_mesh_drafts_alike(drafters: Callable) -> None:
    rng, mesh = np.random.default_rng(0), make_mesh(tensor=2, expert=2)
    for kind, split in (("dflash", "layers"), ("eagle3", "midlayer")):
        drafter = load_drafter(drafters(kind, "tiny"))
        placed = drafter.placed(mesh)
        qkv = placed.params[split]["qkv"]
        assert qkv.addressable_shards[0].data.nbytes * 2 == qkv.nbytes
        features = rng.standard_normal((4, 3, drafter.module.fc.weight.shape[1]), np.float32)

        def drafted(
            params: dict, declaration: Declaration, kind: str = kind, features: np.ndarray = features
        ) -> jax.Array:
            module = bind(declaration, params)
            x, cache = module.fuse(features), lay_over(module.empty(4, 16, jnp.float32), declaration.mesh)
            if kind == "dflash":
                return module.draft(x, module.remember(cache, x, jnp.full((4,), 3)))[0]
            return module.logits(module.extend(x, x, cache)[0])

        one, many = (jax.jit(drafted, static_argnums=1)(d.params, d.declaration) for d in (drafter, placed))
        np.testing.assert_allclose(many, one, atol=1e-4)
    # The head of 300 tokens is not divided by 8 and stays whole.
    wide = load_drafter(drafters("eagle3", "tiny")).placed(make_mesh(tensor=8))
    assert wide.params["lm_head"].is_fully_replicated and wide.params["midlayer"]["qkv"].is_fully_replicated


def test_log_likelihoods_are_computed_once(on_mesh: Callable, omnis: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 rows, which expert=8 does not divide, every device would compute all."""
    ran: list[tuple[int, ...]] = []
    score = loglikelihood.token_log_probs
    monkeypatch.setattr(
        loglikelihood, "token_log_probs", lambda p, ids, *a, **k: ran.append(ids.shape) or score(p, ids, *a, **k)
    )
    got, want = (
        log_likelihoods(omni, prepare_choices(omni, omni.prepare(WORDS[0]), ["yes", "no", "no, never"]), rows=3)
        for omni in (on_mesh("expert=8"), omnis("tiny"))
    )
    assert [shape[0] for shape in ran] == [8, 3]
    assert [one.log_likelihood for one in got] == pytest.approx([one.log_likelihood for one in want], abs=1e-3)


@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "expert=8"])
def test_only_rows_travel(mesh: str, on_mesh: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled steps hold the collectives of their layout, and no weights, no experts and no cache move."""
    omni, text = on_mesh(mesh), on_mesh(mesh).config.thinker.text
    engine, prompted = PlainEngine(omni.params["thinker"], omni.declarations["thinker"], text, Sampling()), []
    monkeypatch.setattr("omni_jax.decode.engine.prefill", lambda *a, **k: prompted.append((a, k)) or prefill(*a, **k))
    batch = omni.prepare(WORDS)
    state = engine.prefill(batch, requests_for(batch, Limits(8), [0] * len(WORDS))).state
    # Rows lie over the expert shards, heads over the tensor axis.
    shape = state.cache.k.sharding.shard_shape(state.cache.k.shape)
    sizes = parse_mesh(mesh)
    assert shape[1:3] == (8 // sizes["expert"], 2 // sizes.get("tensor", 1))
    sampled = (np.int32(5), engine.drawings.own.stop_ids, engine.drawings.own.values)
    step = decode_chunk.lower(
        engine.params, state, *sampled, declaration=engine.declaration, plan=engine.drawings.own.plan
    ).compile()
    found = collectives(step)
    assert {"all-reduce", "reduce-scatter", "all-gather"} <= set(found)
    one_expert = text.hidden_size * text.moe_intermediate_size // sizes.get("tensor", 1)
    one_layer_of_cache = int(np.prod(shape[1:]))
    assert max(found.values()) < min(one_expert, one_layer_of_cache) // 4
    ((arguments, settings),) = prompted
    found = collectives(prefill.lower(*arguments, **settings).compile())
    rows = arguments[1].token_ids.size * text.hidden_size
    assert {"all-reduce", "reduce-scatter", "all-gather"} <= set(found) and max(found.values()) <= rows
    # What a device holds of a layer's experts is more than all that ever moves.
    assert rows < text.num_experts // sizes["expert"] * 3 * one_expert


def test_steps_are_compiled_once(on_mesh: Callable, said: list[list[int]]) -> None:
    omni = on_mesh("expert=8")
    omni.generate(WORDS, max_new_tokens=8, stop_ids=())
    before = decode_chunk._cache_size(), prefill._cache_size()
    replies = omni.generate(WORDS, max_new_tokens=70, stop_ids=())
    assert [reply.token_ids[:8] for reply in replies] == said
    assert (decode_chunk._cache_size(), prefill._cache_size()) == before


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("experts=4", "no axis is called 'experts'"),
        ("expert=2,expert=4", "gives expert twice"),
        ("expert=two", "expert is 'two'"),
        ("expert=0", "expert is '0'"),
        ("expert=-1", "expert is '-1'"),
        ("expert", "expert is ''"),
        ("", "no axis is called ''"),
        ("expert=²", "expert is '²'"),
    ],
)
def test_what_is_no_mesh(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_mesh(text)


def test_meshes_by_name() -> None:
    assert parse_mesh(" expert = 4 , data=2") == {"expert": 4, "data": 2}
    assert mesh_name({"data": 2, "expert": 4}) == "expert=4,data=2" and mesh_name({}) == "data=1"
    assert mesh_name(make_mesh(tensor=2)) == "tensor=2"
    with pytest.raises(InputError, match="needs 4 devices, there are 3"):
        make_mesh(jax.devices()[:3], expert=4)
    with pytest.raises(InputError, match="do not exist"):
        make_mesh(experts=2)


def test_what_does_not_divide_stays_whole() -> None:
    mesh = make_mesh(data=2, expert=4)
    assert [split_over("batch", n, mesh) for n in (8, 4, 3)] == [("data", "fsdp", "expert"), ("data", "fsdp"), ()]
    assert sharding_for(("batch", "kv_heads"), (4, 3), make_mesh(data=2, tensor=2)).spec == P(
        ("data", "fsdp", "expert"), None
    )
    x = jnp.ones((3, 2))
    assert constrain(x, ("batch", None), None) is x
    assert jax.jit(lambda x: constrain(x, ("batch", None), mesh))(x).sharding.is_fully_replicated


def test_rows_are_split_and_numbers_are_whole() -> None:
    rows, number = place_rows((np.zeros((8, 3)), np.uint32(5)), make_mesh(fsdp=8))
    assert rows.sharding.shard_shape(rows.shape) == (1, 3)
    assert number.sharding.is_fully_replicated and number == 5
