"""Low-rank adapters of the Thinker: trained beside a base that stays as it is, and equal to peft's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import omni_jax as oj
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import read_json
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.models.thinker import Thinker
from omni_jax.train.lora.objective import lora_objective
from omni_jax.train.lora.settings import LowRankSettings
from omni_jax.train.lora.table import adapted_table
from omni_jax.train.objective import Loss, Objective
from omni_jax.weights.trees import flatten, nest
from tests.helpers.adapters import TOKENS, fresh, logits

EVERYTHING = LowRankSettings(targets=("attention", "experts", "mlp", "router"), rank=4, alpha=12.0)
BATCH = np.repeat(TOKENS, 8, axis=0)
BATCH[1:] = (BATCH[1:] * np.arange(3, 10)[:, None] + 1) % 470


def next_token_loss(params: dict, frozen: dict, token_ids: jax.Array, *, declaration: Declaration) -> Loss:
    """The cross entropy of each token by those before it, summed."""
    thinker = bind(declaration, nest({**flatten(frozen), **flatten(params)}))
    log_probs = jax.nn.log_softmax(thinker(token_ids)[:, :-1])
    taken = jnp.take_along_axis(log_probs, token_ids[:, 1:, None], axis=-1)
    return Loss(-jnp.sum(taken), jnp.float32(taken.size), {})


def objective(omni: oj.Omni, settings: LowRankSettings = EVERYTHING, **more: Any) -> Objective:
    return lora_objective(settings, omni, next_token_loss, jnp.float32, **more)


def gradient(made: Objective, params: dict) -> dict[str, jax.Array]:
    return flatten(jax.jit(jax.grad(lambda p: made.loss(p, made.frozen, BATCH).total))(params))


def randomised(params: dict, seed: int = 0) -> dict:
    """Factors neither of which is zero, of the size of trained ones."""
    rng = np.random.default_rng(seed)
    flat = flatten(params)
    drawn = {path: 0.3 * rng.standard_normal(x.shape, np.float32) * x.shape[-1] ** -0.5 for path, x in flat.items()}
    return nest({path: jax.device_put(x, flat[path].sharding) for path, x in drawn.items()})


@pytest.fixture(scope="module")
def thinkers(checkpoints: Callable[[str], Path]) -> Callable[[str], oj.Omni]:
    loaded = {name: oj.load(checkpoints(name), parts=("thinker",)) for name in ("small", "odd")}
    return loaded.__getitem__


def run(made: Objective, params: dict) -> np.ndarray:
    thinker: Any = lambda p: bind(made.loss.keywords["declaration"], p)(BATCH)  # type: ignore[attr-defined]  # noqa: E731
    return np.asarray(jax.jit(thinker)(nest({**flatten(made.frozen), **flatten(params)})))


@pytest.mark.parametrize("name", ["small", "odd"])
def test_training_changes_factors_alone_and_lowers_the_loss(name: str, thinkers: Any) -> None:
    omni = thinkers(name)
    before = {path: np.array(x) for path, x in flatten(omni.params).items()}
    made = objective(omni)
    flat = flatten(made.params)
    assert all(not np.any(x) for path, x in flat.items() if path.endswith("/b"))
    np.testing.assert_allclose(run(made, made.params), np.asarray(jax.jit(lambda i: omni.thinker(i))(BATCH)), atol=1e-4)

    optimizer, params = optax.adam(3e-3), made.params
    state = optimizer.init(params)

    @jax.jit
    def step(params: dict, state: Any, frozen: dict) -> tuple:
        loss, gradients = jax.value_and_grad(lambda p: made.loss(p, frozen, BATCH).total)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(8):
        params, state, loss = step(params, state, made.frozen)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.any(x != flat[path]) for path, x in flatten(params).items())
    for path, x in flatten(omni.params).items():
        np.testing.assert_array_equal(np.asarray(x), before[path])


@pytest.mark.parametrize("name", ["small", "odd"])
def test_what_is_saved_and_merged_equals_the_adapter(
    name: str, thinkers: Any, checkpoints: Any, tmp_path: Path
) -> None:
    made = objective(thinkers(name))
    params = randomised(made.params)
    made.save(params, tmp_path / "adapter")
    omni = oj.load(checkpoints(name), parts=("thinker",), adapter=tmp_path / "adapter")
    want, base = run(made, params), np.asarray(jax.jit(lambda i: thinkers(name).thinker(i))(BATCH))
    np.testing.assert_allclose(np.asarray(jax.jit(lambda i: omni.thinker(i))(BATCH)), want, atol=5e-4)
    assert np.abs(want - base).max() > 1
    again = objective(thinkers(name), LowRankSettings(**{**vars(EVERYTHING), "adapter": tmp_path / "adapter"}))
    for path, x in flatten(again.params).items():
        np.testing.assert_allclose(x, flatten(params)[path], rtol=1e-6)


def peft_of(directory: Path, checkpoint: Path) -> Any:
    """transformers' whole model with an adapter of ours, by peft, to be trained."""
    peft = pytest.importorskip("peft")
    model = fresh(checkpoint)
    peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    return model


def test_peft_reads_what_is_saved_and_has_the_same_gradients(thinkers: Any, checkpoints: Any, tmp_path: Path) -> None:
    made = objective(thinkers("small"))
    params = randomised(made.params)
    made.save(params, tmp_path / "adapter")
    model = peft_of(tmp_path / "adapter", checkpoints("small"))
    np.testing.assert_allclose(run(made, params), logits(model.thinker, BATCH), atol=5e-4)

    ids = torch.tensor(BATCH, dtype=torch.long)
    log_probs = torch.log_softmax(model.thinker(input_ids=ids).logits[:, :-1], -1)
    (-log_probs.gather(-1, ids[:, 1:, None]).sum()).backward()
    theirs = {
        name.removeprefix("thinker.model.language_model.layers.").replace(".default.weight", ""): p.grad.numpy()
        for name, p in model.named_parameters()
        if "lora_" in name and p.grad is not None
    }
    ours, r = flatten(nest(gradient(made, params))["layers"]), EVERYTHING.rank
    compared = 0
    for l in range(thinkers("small").config.thinker.text.num_layers):
        for ab in "ab":
            for path, want in _expected(theirs, l, ab, r):
                got = np.asarray(ours[f"{path}/{ab}"][l])
                np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4 * np.abs(want).max())
                compared += 1
    assert compared == len(ours) * thinkers("small").config.thinker.text.num_layers


def _expected(theirs: dict[str, np.ndarray], l: int, ab: str, r: int) -> list[tuple[str, np.ndarray]]:
    """peft's gradients of the factors `ab` of layer `l` by our paths, with those of gate and up taken apart."""
    end = f"lora_{ab.upper()}"
    found = [(f"lora/{x}", theirs[f"{l}.self_attn.{x}_proj.{end}"]) for x in "qkvo"]
    found.append(("moe/router_lora", theirs[f"{l}.mlp.gate.{end}"]))
    both, down = theirs[f"{l}.mlp.experts.base_layer.{end}"], theirs[f"{l}.mlp.experts.{end}"]
    if ab == "a":
        both, down = both.reshape(-1, 2 * r, both.shape[1]), down.reshape(-1, r, down.shape[1])
        parts = both[:, :r], both[:, r:], down
    else:
        both, down = (x.reshape(len(x), n, -1).transpose(2, 0, 1) for x, n in ((both, 2 * r), (down, r)))
        F = both.shape[1] // 2
        parts = both[:, :F, :r], both[:, F:, r:], down
    return found + [(f"moe/lora/{x}", part) for x, part in zip(("gate", "up", "down"), parts, strict=True)]


def test_a_mesh_equals_one_device(thinkers: Any, checkpoints: Any, tmp_path: Path) -> None:
    alone = objective(thinkers("small"))
    params = randomised(alone.params)
    alone.save(params, tmp_path / "adapter")
    sizes = "data=2,expert=2,fsdp=2"
    spread = oj.load(checkpoints("small"), parts=("thinker",), mesh=sizes)
    made = objective(spread)
    assert all(x.sharding.mesh.size == 8 for x in flatten(made.params).values())
    over = randomised(made.params)
    np.testing.assert_allclose(run(made, over), run(alone, params), atol=1e-4)
    want = gradient(alone, params)
    for path, got in gradient(made, over).items():
        np.testing.assert_allclose(got, want[path], atol=1e-4 * np.abs(want[path]).max())
    made.save(over, tmp_path / "spread")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    merged = oj.load(checkpoints("small"), parts=("thinker",), mesh=sizes, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(jax.jit(lambda i: merged.thinker(i))(BATCH), run(alone, params), atol=5e-4)


def declared(targets: tuple[str, ...], data_dir: Path) -> tuple[OmniConfig, Declaration, int]:
    config = OmniConfig.from_hf(read_json(data_dir / "public_config.json"))
    whole = sum(x.size for x in flatten(declare(Thinker, config.thinker).shapes).values())
    wanted = LowRankSettings(targets=targets).for_model(config.thinker.text)
    return config, declare(Thinker, config.thinker, wanted), whole


def trained(config: OmniConfig, declaration: Declaration, whole: int) -> int:
    return sum(x.size for x in flatten(declaration.shapes).values()) - whole


def test_share_of_the_public_model(data_dir: Path) -> None:
    usual = declared(LowRankSettings().targets, data_dir)
    assert trained(*usual) == 6_684_672 and trained(*usual) <= 0.01 * usual[2]
    table = adapted_table(*usual)
    assert "experts:       not adapted" in table and "mlp:           none in this model" in table
    all_experts = declared(("attention", "experts"), data_dir)
    assert trained(*all_experts) == 421_920_768
    assert "experts           18,432     415,236,096    1.309%" in adapted_table(*all_experts)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rank": 0}, "--rank is 0"),
        ({"alpha": 0.0}, "--alpha is 0.0"),
        ({"targets": ("attention", "q_proj")}, "'q_proj' is none of attention, q, k"),
        ({"targets": ("mlp",)}, "--targets mlp: this model has none"),
        ({"targets": ()}, "this model has none"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str, thinkers: Any) -> None:
    with pytest.raises(InputError) as error:
        objective(thinkers("small"), LowRankSettings(**settings))
    assert said in str(error.value)


def test_training_on_needs_the_adapter_of_these_settings(thinkers: Any, tmp_path: Path) -> None:
    omni = thinkers("small")
    made = objective(omni, LowRankSettings(targets=("q", "v"), rank=4))
    made.save(made.params, tmp_path / "adapter")
    for settings, said in (
        ({"targets": ("q", "v"), "rank": 3}, "has rank 4"),
        ({"targets": ("q", "v", "k"), "rank": 4}, "holds nothing for thinker.model.layers.0.self_attn.k_proj"),
        ({"targets": ("q",), "rank": 4}, "also adapts thinker.model.layers.0.self_attn.v_proj"),
    ):
        with pytest.raises(InputError) as error:
            objective(omni, LowRankSettings(**settings, adapter=tmp_path / "adapter"))
        assert said in str(error.value)
    with pytest.raises(CheckpointError, match="exists"):
        made.save(made.params, tmp_path / "adapter")
