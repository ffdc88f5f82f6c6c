"""Recipes for drafters: new ones, on states of the target made in the program or stored, down to their public files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.config import OmniConfig
from omni_jax.draft_config import read_draft_config
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni
from omni_jax.sharding import make_mesh, place_rows
from omni_jax.train.batch import IGNORED, MediaRows, TextBatch
from omni_jax.train.data.samples import TextRecipe
from omni_jax.train.drafters.batch import DraftBatch, DraftBatches, LookedAhead
from omni_jax.train.drafters.check import check_target
from omni_jax.train.drafters.new import Sizes, new_dflash, new_eagle3, spread_layers
from omni_jax.train.drafters.objective import (
    BlockSettings,
    ChainSettings,
    block_states,
    chain_states,
    dflash_objective,
    eagle3_objective,
    for_stored,
)
from omni_jax.train.drafters.recipes import DFlash, Target
from omni_jax.train.drafters.stored import StoredBatches, store_states
from omni_jax.train.drafters.vocabulary import count_learned, count_rows, draft_vocabulary
from omni_jax.train.losses.target import hidden_states
from omni_jax.train.objective import Objective, Step
from omni_jax.train.settings import Batching, Call, Run
from omni_jax.weights.drafters import load_drafter
from scripts.small.configs import PUBLIC_DFLASH, config_dict
from tests.helpers.arrays import close
from tests.parity import audio_part, image_part, user, video_part

CYCLE, LENGTH = 12, 30
BLOCK = BlockSettings(layers=1, features=2, block_size=4, anchors=16)


@pytest.fixture(scope="module")
def repeating(omnis: Callable[[str], Omni]) -> tuple[Omni, np.ndarray]:
    """A model that says the tokens of a cycle in turn, and the cycle: of its layers only the embedding is left."""
    omni = omnis("small")
    thinker = omni.params["thinker"]
    layers = {**thinker["layers"], "out": jnp.zeros_like(thinker["layers"]["out"])}
    layers["moe"] = {**layers["moe"], "down": jnp.zeros_like(layers["moe"]["down"])}
    # The token at which a reply begins is one of them.
    last = omni.prepare([user("Say.")[0]]).token_ids[0, -1]
    cycle = np.array([last, *(t for t in range(100, 100 + CYCLE) if t != last)])[:CYCLE]
    embed = np.asarray(thinker["embed"])
    head = np.zeros_like(embed)
    head[np.roll(cycle, -1)] = 5 * embed[cycle] / np.linalg.norm(embed[cycle], axis=1, keepdims=True)
    params = {**thinker, "layers": layers, "lm_head": jnp.asarray(head)}
    return Omni({"thinker": params}, omni.config, omni.processor), cycle


def rows(cycle: np.ndarray, seed: int) -> TextBatch:
    """Four rows of the cycle, each from a place of its own, whose first tokens are not learned."""
    start = np.random.default_rng(seed).integers(0, CYCLE, (4, 1))
    ids = cycle[(start + np.arange(LENGTH)) % CYCLE].astype(np.int32)
    labels = np.where(np.arange(LENGTH) < 3, IGNORED, ids).astype(np.int32)
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.float32), (3, 4, LENGTH))
    return TextBatch(ids, labels, position, np.zeros((4, LENGTH), np.int32))


def objective_of(kind: str, omni: Omni, cycle: np.ndarray) -> Objective:
    if kind == "dflash":
        return dflash_objective(BLOCK, Sizes(), omni, remat=False)
    counts = count_learned([rows(cycle, 0)], omni.config.thinker.text.vocab_size)
    return eagle3_objective(ChainSettings(draft_vocab_size=20, unrolled=3), Sizes(), omni, counts, remat=False)


def taps_of(kind: str, omni: Omni) -> tuple[int, ...]:
    layers = omni.config.thinker.text.num_layers
    return block_states(BLOCK, layers) if kind == "dflash" else chain_states(layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dflash"])
def test_the_loss_falls_and_more_drafts_are_accepted(
    kind: str, repeating: tuple[Omni, np.ndarray], tmp_path: Path
) -> None:
    omni, cycle = repeating
    made, read = objective_of(kind, omni, cycle), taps_of(kind, omni)
    declaration = omni.declarations["thinker"]
    states_of = jax.jit(lambda text: hidden_states(made.frozen, text, read, declaration=declaration))
    texts = [rows(cycle, seed) for seed in range(3)]
    stored, ends = [states_of(text).swapaxes(0, 1) for text in texts], for_stored(made).frozen
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, memory: Any, frozen: Any, batch: DraftBatch) -> tuple:
        def mean(params: Any) -> jax.Array:
            loss = made.loss(params, frozen, batch)
            return loss.total / loss.weight

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(params, updates), memory, loss

    params, memory, losses = made.params, optimizer.init(made.params), []
    made.save(params, tmp_path / "before")
    for number in range(30):
        batch = DraftBatch(texts[number % 3], np.asarray(number, np.uint32), stored[number % 3])
        params, memory, loss = step(params, memory, ends, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    made.save(params, tmp_path / "after")
    given = {}
    for name in ("before", "after"):
        reply = omni.generate(
            [user("Say.")[0]], drafter=load_drafter(tmp_path / name), draft_tokens=3, max_new_tokens=24
        )
        assert set(reply.token_ids) <= set(cycle.tolist())
        given[name] = reply.stats["tokens_per_round"]
    assert given["before"] < 1.5 and given["after"] > 1.5 * given["before"]


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_stored_states_on_a_mesh_give_the_same_loss(
    kind: str, repeating: tuple[Omni, np.ndarray], tmp_path: Path
) -> None:
    omni, cycle = repeating
    made = objective_of(kind, omni, cycle)
    taps = taps_of(kind, omni)
    declaration, about = omni.declarations["thinker"], {"taps": taps, "dtype": "float32"}
    states_of = jax.jit(lambda text: hidden_states(made.frozen, text, taps, declaration=declaration))
    store_states(tmp_path / "states", Rows(cycle, 3), about, states_of)
    loss, found, light, mesh = jax.jit(made.loss), {}, for_stored(made), make_mesh(data=2, fsdp=2)
    assert light.frozen.keys() == {"embed", "lm_head"}
    params, ends = jax.device_put((light.params, light.frozen), NamedSharding(mesh, PartitionSpec()))
    for step in some(StoredBatches(tmp_path / "states", about, seed=1), 3):
        seed = int(step.samples[0])
        online = loss(made.params, made.frozen, DraftBatch(rows(cycle, seed), step.batch.number))
        batch = place_rows(step.batch, mesh)
        assert batch.states.sharding.shard_shape(batch.states.shape)[:2] == (1, len(taps))
        offline = loss(params, ends, batch)
        close(offline.total, online.total)
        found[seed] = float(offline.total)
    assert found.keys() == {0, 1, 2} and len(set(found.values())) == 3


class Rows:
    """An epoch of batches, numbered in their samples."""

    def __init__(self, cycle: np.ndarray, count: int, stop: int | None = None):
        self.cycle, self.count, self.stop, self.at = cycle, count, stop, 0

    @property
    def steps(self) -> int:
        return self.count

    @property
    def epoch(self) -> int:
        return self.at // self.count

    def __iter__(self) -> Iterator[Step]:
        while True:
            if self.at == self.stop:
                raise KeyboardInterrupt
            self.at += 1
            yield Step(rows(self.cycle, self.at - 1), [str(self.at - 1)], 4 * LENGTH)

    def state(self) -> dict:
        return {"at": self.at}

    def restore(self, state: dict) -> None:
        self.at = state["at"]


def some(batches: Any, count: int) -> list[Step]:
    return [step for _, step in zip(range(count), batches, strict=False)]


def constant(batch: TextBatch) -> jax.Array:
    """States that follow from the tokens."""
    return jnp.asarray(batch.token_ids, jnp.bfloat16)[None, ..., None] * jnp.ones((2, 1, 1, 3), jnp.bfloat16)


def test_storing_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    cycle, about = np.arange(CYCLE), {"taps": [1, 2], "dtype": "bfloat16"}
    with pytest.raises(KeyboardInterrupt):
        store_states(tmp_path / "states", Rows(cycle, 5, stop=2), about, constant)
    with pytest.raises(InputError, match="2 of 5 batches"):
        StoredBatches(tmp_path / "states", about)
    with (tmp_path / "states" / "index.jsonl").open("a") as index:
        index.write('{"samples": ["cut o')
    assert store_states(tmp_path / "states", Rows(cycle, 5), about, constant) == 3
    batches = StoredBatches(tmp_path / "states", about, seed=2, epochs=2)
    steps = list(batches)
    assert len(steps) == batches.steps == 10 and batches.epoch == 2
    for step in steps:
        want = rows(cycle, int(step.samples[0]))
        for name in ("token_ids", "labels", "first_seen"):
            np.testing.assert_array_equal(getattr(step.batch.text, name), getattr(want, name))
        np.testing.assert_array_equal(step.batch.states, np.asarray(constant(want)).swapaxes(0, 1))
        assert isinstance(step.batch.states, np.memmap)
    orders = [[int(step.samples[0]) for step in steps[i : i + 5]] for i in (0, 5)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(5)) and orders[0] != orders[1]
    again = StoredBatches(tmp_path / "states", about, seed=2)
    some(again, 3)
    other = StoredBatches(tmp_path / "states", about, seed=2)
    other.restore(again.state())
    assert [s.samples for s in some(other, 5)] == [s.samples for s in steps[3:8]]
    with pytest.raises(InputError, match=r"taps \[1, 2\], not \[1, 3\]"):
        StoredBatches(tmp_path / "states", {**about, "taps": [1, 3]})
    with pytest.raises(InputError, match="have them stored there first"):
        StoredBatches(tmp_path / "nothing", about)


def test_a_batch_that_became_unusable_is_not_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fewer(Rows):
        def __iter__(self) -> Iterator[Step]:
            return (step for step in islice(super().__iter__(), 3) if step.samples != ["1"])

    assert store_states(tmp_path / "states", Fewer(np.arange(CYCLE), 3), {"taps": [1, 2]}, constant) == 2
    stored = StoredBatches(tmp_path / "states", {"taps": [1, 2]}, epochs=1)
    assert sorted(step.samples[0] for step in stored) == ["0", "2"] and stored.steps == 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="one process stores hidden states"):
        store_states(tmp_path / "others", Rows(np.arange(CYCLE), 3), {"taps": [1, 2]}, constant)


def test_batches_that_were_looked_at_come_next() -> None:
    batches = LookedAhead(Rows(np.arange(CYCLE), 9))
    assert [step.samples for step in batches.look(2)] == [["0"], ["1"]] and batches.state() == {"at": 0}
    assert [step.samples for step in some(batches, 1)] == [["0"]] and batches.state() == {"at": 1}
    assert [step.samples for step in some(batches, 2)] == [["1"], ["2"]]
    assert batches.state() == {"at": 3} == batches.batches.state()  # none was prepared twice
    batches.look(2)
    batches.restore({"at": 7})
    assert [step.samples for step in some(batches, 1)] == [["7"]]


def test_batches_are_numbered_and_go_on() -> None:
    batches = DraftBatches(Rows(np.arange(CYCLE), 9))
    assert [int(step.batch.number) for step in some(batches, 3)] == [0, 1, 2]
    other = DraftBatches(Rows(np.arange(CYCLE), 9))
    other.restore(batches.state())
    (step,) = some(other, 1)
    assert int(step.batch.number) == 3 and step.samples == ["3"]


def test_the_target_is_checked_first(repeating: tuple[Omni, np.ndarray]) -> None:
    omni, cycle = repeating
    batch = rows(cycle, 0)
    assert check_target(omni, [batch]) == 1.0
    wrong = replace(batch, token_ids=batch.token_ids[:, ::-1].copy(), labels=batch.labels[:, ::-1].copy())
    with pytest.raises(InputError, match="omni-jax train regenerate"):
        check_target(omni, [wrong])
    with pytest.raises(InputError, match="no token of the data is learned"):
        check_target(omni, [replace(batch, labels=np.full_like(batch.labels, IGNORED))])


def test_states_of_prompts_with_media_are_those_of_decoding(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    prompts = [
        [user(image_part(60, 60, 1), audio_part(1.1, 2), "Both.")[0]],
        [user(video_part(4, 64, 64, 2.0, 6), "?")[0]],
    ]
    batch = omni.prepare(prompts)
    first = np.where(batch.mask, 0, np.arange(batch.mask.shape[1])).astype(np.int32)
    text = TextBatch(batch.token_ids, batch.token_ids, batch.position_ids, first, media_rows(batch))
    declaration, taps = omni.declarations["thinker"], (1, 3, 5)
    got = jax.jit(lambda p, t: hidden_states(p, t, taps, declaration=declaration))(omni.params["thinker"], text)
    thinker, media = omni.thinker, omni.encode(batch)
    x = thinker.embed_tokens(jnp.asarray(batch.token_ids), media)
    want = thinker.forward(x, jnp.asarray(batch.position_ids), None, media, taps).taps
    close(np.asarray(got)[:, batch.mask], np.asarray(want)[:, batch.mask], 1e-4)


def media_rows(batch: Batch) -> MediaRows:
    audio = None if batch.audio is None else (batch.audio.mel, batch.audio.frames, batch.audio.width)
    vision = tuple((group.patches, group.grid) for group in batch.vision)
    return MediaRows(vision, audio, batch.visual_index, batch.audio_index)


def test_a_new_drafter_for_the_public_model_is_the_public_ones() -> None:
    target = OmniConfig.from_hf(config_dict("full"))
    assert spread_layers(5, 48) == [1, 12, 23, 34, 45] and spread_layers(5, 36) == [1, 9, 17, 25, 33]
    assert spread_layers(1, 48) == [24] and spread_layers(3, 4) == [0, 2, 3]
    stated = read_draft_config(PUBLIC_DFLASH)
    values = Sizes().values(target.thinker.text)
    named = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert {name: values[name] for name in named} == {name: PUBLIC_DFLASH[name] for name in named}
    assert stated.taps(48) == tuple(j + 1 for j in spread_layers(5, 48))
    with pytest.raises(InputError, match="audio_start"):
        new_dflash(
            OmniConfig.from_hf(config_dict("tiny")),
            config_dict("tiny")["thinker_config"]["audio_start_token_id"],
            1,
            1,
            4,
            Sizes(),
            0,
        )


def test_the_tokens_that_are_learned_are_counted_in_every_form(omnis: Callable[[str], Omni]) -> None:
    processor = omnis("tiny").processor
    tokenizer, recipe = processor.tokenizer, TextRecipe.of(processor, 64)
    asked, end = {"role": "user", "content": "ab"}, tokenizer.token_id("<|im_end|>")
    forms = (
        {"messages": [asked, {"role": "assistant", "content": "ca"}]},
        {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": "ca"}]}]},
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "ca"}]},
    )
    said = np.bincount([*tokenizer.encode_plain("ca"), end], minlength=512)
    for row in (*forms, {"text": "abc cab"}):
        (sample,) = recipe.samples(row, Path(), "rows:1")
        broken = [(Path(), other) for other in (5, {"messages": ["no"]}, {"messages": 5})]
        counts = count_rows([(Path(), row), *broken], recipe.learned, 512)
        np.testing.assert_array_equal(counts, np.bincount(sample.token_ids[sample.learned], minlength=512))
        assert "text" in row or counts.tolist() == said.tolist()


@pytest.mark.parametrize(
    "settings, said",
    [
        (BlockSettings(anchors=0), "--anchors is 0"),
        (BlockSettings(features=0), "--features is 0"),
        (BlockSettings(decay=0.0), "--decay is 0.0"),
        (BlockSettings(expected=1.5), "--expected is 1.5"),
        (BlockSettings(mask_token="<|none|>"), "--mask-token: the model has no token"),
        (ChainSettings(unrolled=0), "--unrolled is 0"),
        (ChainSettings(decay=float("nan")), "--decay is nan"),
        (ChainSettings(draft_vocab_size=0), "--draft-vocab-size is 0"),
    ],
)
def test_settings_that_cannot_be(settings: Any, said: str, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    made = {BlockSettings: dflash_objective, ChainSettings: partial(eagle3_objective, counts=np.ones(512, int))}
    with pytest.raises(InputError, match=said):
        made[type(settings)](settings, Sizes(), omni)


def test_a_dry_run_stores_no_states(omnis: Callable[[str], Omni], tmp_path: Path) -> None:
    omni, data = omnis("tiny"), tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]
    data.write_text(json.dumps({"conversations": turns}) + "\n")
    run = Run(model=Path("m"), data=(data,), output=tmp_path / "run", epochs=3)
    target = Target(states=tmp_path / "states", least_accuracy=0)
    for dry in (True, False):
        recipe = DFlash(run=run, batch=Batching(workers=0, max_length=64), target=target, call=Call(dry_run=dry))
        batches = recipe.batches(omni)
        (step,) = some(batches, 1)
        text = step.batch.text
        assert batches.steps == 3 and step.batch.states.shape == (1, 4, text.token_ids.shape[1], 256)
        assert np.any(step.batch.states) == (tmp_path / "states").exists() == (not dry)


@pytest.mark.parametrize("layers, taps", [(48, (2, 24, 45)), (12, (2, 6, 9)), (4, (1, 2, 4)), (3, (1, 2, 3))])
def test_the_states_that_eagle3_reads_are_found_again(layers: int, taps: tuple[int, ...]) -> None:
    """Whichever key of config.json states them; 48 layers as in the public drafter."""
    values = config_dict("tiny")
    values["thinker_config"]["text_config"]["num_hidden_layers"] = layers
    target = OmniConfig.from_hf(values)
    head = np.zeros((target.thinker.text.vocab_size, target.thinker.text.hidden_size), np.float32)
    drafter = new_eagle3(target, np.zeros(5, int), head, Sizes(heads=2, head_dim=8, mlp=8), 0)
    assert drafter.taps(layers) == taps
    if layers == 48:
        assert drafter.values["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 23, 44]


def test_a_draft_vocabulary_holds_the_most_frequent_tokens() -> None:
    counts = np.array([0, 5, 0, 7, 5, 1])
    offsets = draft_vocabulary(counts, 3)
    assert (np.arange(3) + offsets).tolist() == [1, 3, 4]
    assert (np.arange(5) + draft_vocabulary(counts, 5)).tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(InputError, match="6: ask for at most these"):
        draft_vocabulary(counts, 7)
    with pytest.raises(InputError, match="none to draft"):
        draft_vocabulary(np.zeros(6, int), 3)
