"""A request whose caches would not fit is refused before they are made, with the plan, what there is and the remedy."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import convert_checkpoint
from omni_jax.decode import generation, memory
from omni_jax.decode.generation import GenerationPlan
from omni_jax.decode.limits import Limits
from omni_jax.decode.memory import CacheNeed, Memory, available, weight_bytes
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Reply
from omni_jax.decode.rows import caches_of
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.errors import InputError
from omni_jax.loading import load, load_lazily
from omni_jax.omni import Omni
from omni_jax.settings import Settings, Voice
from omni_jax.sharding import make_mesh
from omni_jax.weights.budget import GROWTH, cache_bytes
from omni_jax.weights.drafters import load_drafter
from tests.parity import user


@pytest.fixture
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("tiny")


def stated(params: Any) -> int:
    """Bytes of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def one(made: Any) -> Reply:
    """The reply to one conversation."""
    assert isinstance(made, Reply)
    return made


def with_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(memory, "usable", lambda device: int(gigabytes * 1e9))


def test_a_cache_is_planned_as_it_is_made(omni: Omni) -> None:
    text = omni.config.thinker.text
    made = 2 * text.num_layers * 3 * text.num_kv_heads * 512 * text.head_dim * 4
    planned = CacheNeed("thinker", text, 3, 300).bytes(omni.params, None)
    assert planned == int(GROWTH * made) + made // 3
    halves = {"thinker": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), omni.params["thinker"])}
    assert CacheNeed("thinker", text, 3, 300).bytes(halves, None) == planned // 2, "in the weights' type, read or not"


@pytest.mark.parametrize("kind, tree", [("eagle3", (7, 10)), ("dflash", None)])
def test_drafts_and_the_drafter_are_planned_for(
    kind: str, tree: tuple[int, int] | None, omni: Omni, drafters: Callable[[str, str], Path]
) -> None:
    batch = omni.prepare(user("word " * 57))
    prompt, new = int(batch.mask.sum()), 256 - int(batch.mask.sum())
    assert 0 < new < 20, "without drafts all would fit the smallest cache"
    request = Settings.read({"draft_tree": tree, "max_new_tokens": new, "stop_ids": ()})
    plan = omni._plan(request, request.ending, False, load_drafter(drafters(kind, "tiny")), 1)
    batching = omni._make_generator().batching(plan, 1, omni._make_generator().together(plan, batch, [0]))
    batching.finish()
    planned = plan.caches(1, prompt, new, omni.config)
    assert [need.owner for need in planned] == ["thinker", "drafter"]
    made = [stated((cache.k, cache.v)) for cache in caches_of(batching.state)]
    assert sorted(cache_bytes(need.text, 4, {}, 1, need.tokens) for need in planned) == sorted(made)


def test_the_columns_of_speech_are_planned_for(omni: Omni) -> None:
    batch, voice = omni.prepare(user("Hi")), Voice(max_frames=10)
    columns = SpeechRequest.read(batch, voice, omni.config).prompt.length
    plan = GenerationPlan(Sampling(), Limits(5), voice, None)
    _, talker = plan.caches(1, int(batch.mask.sum()), 5, omni.config)
    assert talker.tokens == int(columns.max()) + 10


def test_what_is_free_is_read_once_for_a_call(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(memory, "available", lambda mesh: read.append(mesh) or 10**12)
    omni.generate(user("Hi"), max_new_tokens=1)
    assert read == [None]


def test_slots_are_whole_for_the_meshes_of_all_parts(omni: Omni) -> None:
    meshes = {"thinker": make_mesh(data=2), "talker": make_mesh(data=3)}
    free = Memory(omni.params, meshes, dict.fromkeys(meshes.values(), 10**12))
    generator = replace(omni._make_generator(), meshes=meshes, memory=free)
    plan = GenerationPlan(Sampling(), Limits(5), Voice(), None)
    assert generator.slots(plan, 8, 5) == 12 and generator.slots(replace(plan, voice=None), 8, 5) == 8


def test_the_talker_has_the_embeddings_that_the_thinker_has_now(omni: Omni) -> None:
    meshes = {"thinker": None, "talker": make_mesh(data=2), "code2wav": None}
    apart = Omni({**omni.params, "thinker": dict(omni.params["thinker"])}, omni.config, omni.processor, meshes)
    copied = apart._embed_for_talker()
    assert len(copied.sharding.device_set) == 2 and apart._embed_for_talker() is copied
    apart.params["thinker"]["embed"] = 2 * apart.params["thinker"]["embed"]
    np.testing.assert_array_equal(apart._embed_for_talker(), 2 * np.asarray(copied))


def test_what_there_is(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**12)
    assert available(None) == 9 * 10**11, "CPUs do not state theirs: it is what the host has free"
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.85 * host < available(None) < 0.95 * host
    params = omni.params["thinker"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    awaited = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert weight_bytes(params, None) == 0 and weight_bytes(awaited, None) == size, "what is read is not free any more"
    with_memory(monkeypatch, 1)
    assert weight_bytes(params, None) == weight_bytes(awaited, None) == size


def test_weights_that_are_not_read_are_planned_for(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ours", progress=False)
    read: list[str] = []
    omni = load_lazily(tmp_path / "ours", dtype="bfloat16", before_reading=lambda omni: read.append("weights"))
    with_memory(monkeypatch, 1)
    size = weight_bytes(list(omni.params.values()), None)
    with_memory(monkeypatch, size / 1e9 / 0.9)
    with pytest.raises(InputError, match="there are 0.00 GB beside the weights"):
        omni.generate(user("Hi"), max_new_tokens=30_000)
    assert not read
    with_memory(monkeypatch, 1)
    made = one(omni.generate(user("Hi"), max_new_tokens=3, stop_ids=())).token_ids
    assert size == sum(x.nbytes for x in jax.tree.leaves(omni.params)) and read == ["weights"]
    assert one(omni.generate(user("Hi"), max_new_tokens=3, stop_ids=())).token_ids == made and read == ["weights"]


def test_every_door_reads_the_weights_that_it_needs(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ours", progress=False)
    whole = load(tmp_path / "ours")
    batch, codes = whole.prepare(user("Hi")), np.zeros((16, 2), np.int32)
    doors: list[Callable[[Omni], Any]] = [
        lambda omni: omni.logits(batch),
        lambda omni: omni.vocode(codes),
        lambda omni: [r.token_ids for _, r in omni.generate_many([user("Hi")], slots=1, max_new_tokens=2)],
        lambda omni: [event.text for event in omni.stream(user("Hi"), max_new_tokens=2)],
        lambda omni: omni.thinker.embed[...],
    ]
    for door in doors:
        lazy = load_lazily(tmp_path / "ours")
        np.testing.assert_array_equal(door(lazy), door(whole))


def test_a_device_that_states_its_memory(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text, weights = omni.config.thinker.text, stated(omni.params["thinker"])
    need = CacheNeed("thinker", text, 4, 1000).bytes(omni.params, None)
    here = {"thinker": omni.params["thinker"]}
    monkeypatch.setattr(memory, "usable", lambda device: weights + need)
    Memory.read(here, {"thinker": None}).check([CacheNeed("thinker", text, 4, 1000)], "have fewer")
    monkeypatch.setattr(memory, "usable", lambda device: weights + need - 1)
    with pytest.raises(
        InputError,
        match=r"4 rows of up to 1,000 .*have fewer: 3 of these rows, or rows of at most 512 .*_MEM_FRACTION",
    ):
        Memory.read(here, {"thinker": None}).check([CacheNeed("thinker", text, 4, 1000)], "have fewer")


@pytest.mark.parametrize(
    "door, settings, words",
    [
        ("generate", {"n": 30, "temperature": 1.0}, "30 rows"),
        ("generate", {"max_new_tokens": 30_000}, "30,0"),
        ("stream", {"max_new_tokens": 30_000}, "lower max_new_tokens:"),
        ("generate", {"speech": True, "max_frames": 30_000}, "(talker)"),
        ("generate", {"n": 10**12, "temperature": 1.0}, "1,000,000,000,000 rows"),
        ("generate_many", {"slots": 30, "max_new_tokens": 1024}, "30 rows"),
        ("generate_many", {"slots": 10**9}, "1,000,000,000 rows"),
    ],
)
def test_requests_that_do_not_fit(
    door: str, settings: dict[str, Any], words: str, omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, (stated(omni.params) + 20e6) / 1e9)
    messages = [user("Hi")] if door == "generate_many" else user("Hi")
    with pytest.raises(InputError) as refused:
        getattr(omni, door)(messages, **settings)
    assert words in str(refused.value) and "beside the weights" in str(refused.value)


def test_slots_are_planned_for_prompts_and_replies_together(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text, beside = omni.config.thinker.text, (stated(omni.params) + 10) / 1e9
    one_step = CacheNeed("thinker", text, 1, 4096).bytes(omni.params, None) / 1e9
    with_memory(monkeypatch, beside + one_step)
    batch = omni.prepare(user("word " * 400))
    assert 1024 < batch.mask.sum() < 2000
    with pytest.raises(InputError, match=r"2 rows of up to 2,[0-9]{3} tokens"):
        list(omni.generate_many([Prompt(batch, 0, 1024)], slots=2))
    assert len(list(omni.generate_many([Prompt(batch, 0, 2)], slots=2))) == 1


def test_slots_that_nobody_stated_are_as_many_as_fit(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text, beside = omni.config.thinker.text, (stated(omni.params) + 10) / 1e9
    seen, batching = [], generation.Batching
    monkeypatch.setattr(generation, "Batching", lambda *given: seen.append(given[1]) or batching(*given))
    for rows in (12, 5, 1):
        with_memory(monkeypatch, beside + CacheNeed("thinker", text, rows, 4097).bytes(omni.params, None) / 1e9)
        omni.generate_many([], max_new_tokens=4096)
        with pytest.raises(InputError, match=f"{rows} of these rows, or rows of at most"):
            omni.generate_many([], max_new_tokens=4097, slots=50)
    assert seen == [12, 5, 1]


def test_prompts_have_limits_of_their_own(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, (stated(omni.params) + 10) / 1e9 + 0.02)
    small = replace(omni.config.thinker.text, max_position_embeddings=1000)
    monkeypatch.setattr(omni, "config", replace(omni.config, thinker=replace(omni.config.thinker, text=small)))
    ((_, reply),) = omni.generate_many([Prompt(omni.prepare(user("Hi")), 0, 2)], stop_ids=())
    assert len(reply.token_ids) == 2
    with pytest.raises(InputError, match="context of 1000"):
        omni.generate_many([], max_new_tokens=1000)
    with pytest.raises(InputError, match="max_new_tokens is 1024: together more than the model's context of 1000"):
        list(omni.generate_many([user("Hi")]))


def test_a_prompt_that_all_slots_would_have_to_hold(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, (stated(omni.params) + 20e6) / 1e9)
    answers = omni.generate_many([user("Hi"), user("word " * 4000)], slots=3, max_new_tokens=3)
    with pytest.raises(InputError, match="3 rows of up to 16,"):
        list(answers)


def test_a_number_of_rows_beyond_any_machine_is_one_sentence(omni: Omni) -> None:
    with pytest.raises(InputError, match="GB of a device for caches"):
        omni.generate([{"role": "user", "content": "Hi"}], n=10**20, temperature=1.0)


def test_the_caches_of_running_requests_are_not_counted_twice(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.0)
    need = CacheNeed("thinker", omni.config.thinker.text, 2, 1024).bytes(omni.params, None)
    free = iter([need] + [0] * 99)
    monkeypatch.setattr(memory, "available", lambda mesh: next(free) + stated(omni.params))
    assert len(list(omni.generate_many([user("Hi")] * 5, slots=2, max_new_tokens=2))) == 5


def test_default_slots_have_room_for_the_default_limit(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text, beside = omni.config.thinker.text, (stated(omni.params) + 10) / 1e9
    with_memory(monkeypatch, beside + CacheNeed("thinker", text, 3, 1024 + 900).bytes(omni.params, None) / 1e9)
    assert len(list(omni.generate_many([user("Hi")] * 2, stop_ids=[*range(text.vocab_size)]))) == 2
