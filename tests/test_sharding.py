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

from convert import convert_checkpoint, load_hf
from omni_jax.decode.generate import decode_chunk, prefill
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
from omni_jax.decode.slots import Prompt, Slots, insert
from omni_jax.drafter import load_drafter
from omni_jax.errors import InputError
from omni_jax.inputs.processor import Processor
from omni_jax.loading import load
from omni_jax.models.param import Graph, bind
from omni_jax.omni import Omni
from omni_jax.ops.cache import lay_over
from omni_jax.sharding import constrain, fitted, make_mesh, mesh_name, parse_mesh, split_over
from tests.ops.test_expert_parallel import collectives
from tests.parity import audio_part, image_part, user

WORDS = [user(text) for text in ("Why?", "One two", "The sky is blue.", "Go on", "a b c", "Tell me", "x", "And then?")]
MEDIA = [user("Just words."), user(image_part(60, 90), "What?"), user(audio_part(1.2), "Who?"), user("Four rows.")]
MESHES = ("data=1", "data=8", "expert=2", "expert=4", "expert=8", "expert=4,data=2", "expert=4,tensor=2")


@pytest.fixture(scope="module")
def on_mesh(checkpoints: Callable[[str], Path]) -> Callable[[str], Omni]:
    """`on_mesh("expert=4")` is the whole "tiny" model on that mesh of the 8 devices."""

    @cache
    def load(text: str) -> Omni:
        mesh = make_mesh(**parse_mesh(text))
        params, config = load_hf(checkpoints("tiny"), mesh=mesh)
        return Omni(params, config, Processor.from_dir(checkpoints("tiny"), config), mesh)

    return load


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
    omni, row = on_mesh("expert=8"), []

    def session(prompt: Prompt) -> Session:
        asked = (prompt.batch, Sampling(), prompt.max_new_tokens, prompt.seed)
        row.append(omni._sessions(*asked, (), None, None)[0])
        return row[-1]

    slots = Slots((Prompt(omni.prepare(one), 0, 8) for one in WORDS), session, 12, omni.meshes["thinker"])
    got = {taken.number: taken.session.rows[0] for taken in slots.finished()}
    assert [got[i] for i in range(len(WORDS))] == said
    text, cache = omni.config.thinker.text, slots.state.cache
    one = text.num_layers * text.num_kv_heads * cache.slots * text.head_dim * 4
    for buffer in (cache.k, cache.v):
        assert [shard.data.nbytes for shard in buffer.addressable_shards] == [2 * one] * 8, "16 rows over 8 devices"
    # Writing a prompt's row moves no cache between devices, nor copies it.
    _, alone = row[0].begin()
    writing = insert.lower(slots.state, alone, np.int32(3)).compile()
    assert max([0, *collectives(writing).values()]) < one
    assert writing.memory_analysis().temp_size_in_bytes < one


@pytest.fixture(scope="module")
def spoken(omnis: Callable[[str], Omni]) -> list[Any]:
    """What one device says to `HEARD`, aloud."""
    return omnis("tiny").generate(HEARD, **ALOUD)


HEARD = [MEDIA[2], MEDIA[0]]
SILENT: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": ()}
ALOUD: dict[str, Any] = {**SILENT, "speech": True, "speech_temperature": 0.0, "max_frames": 4}


def check_speech(omni: Omni, spoken: list[Any]) -> None:
    for got, want in zip(omni.generate(HEARD, **ALOUD), spoken, strict=True):
        assert got.token_ids == want.token_ids
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_allclose(got.audio, want.audio, atol=1e-3)


@pytest.mark.slow
def test_speech(on_mesh: Callable, spoken: list[Any]) -> None:
    check_speech(on_mesh("expert=2,tensor=2,data=2"), spoken)


def test_media(on_mesh: Callable, omnis: Callable) -> None:
    omni = on_mesh("expert=4,tensor=2")
    batch = omni.prepare(MEDIA)
    got, want = (np.asarray(o.logits(batch))[batch.mask] for o in (omni, omnis("tiny")))
    np.testing.assert_allclose(got, want, atol=5e-4, rtol=0)


def test_parts_on_devices_of_their_own(checkpoints: Callable, tmp_path: Path, spoken: list[Any]) -> None:
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ours")
    omni = load(tmp_path / "ours", mesh="thinker:expert=4;talker:expert=2,tensor=2")
    where = {part: [d.id for d in omni.meshes[part].devices.flat] for part in omni.meshes}
    assert where == {"thinker": [0, 1, 2, 3], "talker": [4, 5, 6, 7], "code2wav": [4, 5, 6, 7]}
    for part, params in omni.params.items():
        assert {d.id for x in jax.tree.leaves(params) for d in x.devices()} == set(where[part])
    check_speech(omni, spoken)


@pytest.mark.parametrize("kind, tree", [("dflash", None), ("eagle3", None), ("eagle3", (2, 3))])
def test_drafting(
    kind: str, tree: tuple[int, int] | None, on_mesh: Callable, omnis: Callable, drafters: Callable, said: list
) -> None:
    drafter = load_drafter(drafters(kind, "tiny"))
    asked: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (), "drafter": drafter, "draft_tree": tree}
    got = on_mesh("expert=4,tensor=2").generate(WORDS[:4], **asked, draft_tokens=4)
    assert [reply.token_ids for reply in got] == said[:4]
    if tree:
        want = omnis("tiny").generate(WORDS[:4], **asked, draft_tokens=4)
        assert [reply.stats["rounds"] for reply in got] == [reply.stats["rounds"] for reply in want]


def test_a_drafter_on_a_mesh_drafts_alike(drafters: Callable) -> None:
    rng, mesh = np.random.default_rng(0), make_mesh(tensor=2, expert=2)
    for kind, split in (("dflash", "layers"), ("eagle3", "midlayer")):
        drafter = load_drafter(drafters(kind, "tiny"))
        placed = drafter.placed(mesh)
        qkv = placed.params[split]["qkv"]
        assert qkv.addressable_shards[0].data.nbytes * 2 == qkv.nbytes
        features = rng.standard_normal((4, 3, drafter.module.fc.weight.shape[1]), np.float32)

        def drafted(params: dict, graph: Graph, kind: str = kind, features: np.ndarray = features) -> jax.Array:
            module = bind(graph, params)
            x, cache = module.fuse(features), lay_over(module.empty(4, 16, jnp.float32), graph.mesh)
            if kind == "dflash":
                return module.draft(x, module.remember(cache, x, jnp.full((4,), 3)))[0]
            return module.logits(module.extend(x, x, cache)[0])

        one, many = (jax.jit(drafted, static_argnums=1)(d.params, d.graph) for d in (drafter, placed))
        np.testing.assert_allclose(many, one, atol=1e-4)
    # The head of 300 tokens is not divided by 8 and stays whole.
    wide = load_drafter(drafters("eagle3", "tiny")).placed(make_mesh(tensor=8))
    assert wide.params["lm_head"].is_fully_replicated and wide.params["midlayer"]["qkv"].is_fully_replicated


@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "expert=8"])
def test_only_rows_travel(mesh: str, on_mesh: Callable) -> None:
    """The compiled steps hold the collectives of their layout, and no weights, no experts and no cache move."""
    omni, text = on_mesh(mesh), on_mesh(mesh).config.thinker.text
    asked = (omni.params["thinker"], omni.graphs["thinker"], text, omni.prepare(WORDS), Sampling(), 8, 0, ())
    session = Session(*asked)
    _, state = session.begin()
    # Rows lie over the expert shards, heads over the tensor axis.
    shape = state.cache.k.sharding.shard_shape(state.cache.k.shape)
    sizes = parse_mesh(mesh)
    assert shape[1:3] == (8 // sizes["expert"], 2 // sizes.get("tensor", 1))
    sampled = (np.int32(5), session.stop_ids, session.values)
    step = decode_chunk.lower(session.params, state, *sampled, graph=session.graph, plan=session.plan).compile()
    found = collectives(step)
    assert {"all-reduce", "reduce-scatter", "all-gather"} <= set(found)
    one_expert = text.hidden_size * text.moe_intermediate_size // sizes.get("tensor", 1)
    one_layer_of_cache = int(np.prod(shape[1:]))
    assert max(found.values()) < min(one_expert, one_layer_of_cache) // 4


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
    assert fitted(("batch", "kv_heads"), (4, 3), make_mesh(data=2, tensor=2)).spec == P(
        ("data", "fsdp", "expert"), None
    )
    x = jnp.ones((3, 2))
    assert constrain(x, ("batch", None), None) is x
    assert jax.jit(lambda x: constrain(x, ("batch", None), mesh))(x).sharding.is_fully_replicated
