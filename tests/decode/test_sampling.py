"""Filters against transformers' logits processors, draws against the distribution, and errors for settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode.sampling import Plan, Sampling, _keep, draw_keyed, filtered, penalise, sample
from omni_jax.errors import InputError

V = 50


def logits(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, V)).astype(np.float32) * 3


def survivors(settings: Sampling, scores: np.ndarray) -> np.ndarray:
    """Which tokens can be drawn at all, bool [B, V], from our filters."""
    scaled = scores / settings.temperature
    plan = settings.plan(V)
    top, ids = jax.lax.top_k(scaled, plan.candidates)
    top = jnp.where(jnp.arange(plan.candidates) < settings.values()["top_k"], top, -jnp.inf)
    keep = np.isfinite(top) & np.asarray(_keep(top, settings.values()["top_p"], settings.values()["min_p"]))
    out = np.zeros(scores.shape, bool)
    np.put_along_axis(out, np.asarray(ids), keep, axis=1)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(0.9, top_k=20, top_p=0.6),
        Sampling(0.9, top_k=30, top_p=0.9, min_p=0.05),
    ],
)
def test_filters_are_those_of_transformers(settings: Sampling) -> None:
    import torch
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits())
    chain = [hf.TemperatureLogitsWarper(settings.temperature)]
    chain += [hf.TopKLogitsWarper(settings.top_k)] if settings.top_k else []
    chain += [hf.TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
    chain += [hf.MinPLogitsWarper(settings.min_p)] if settings.min_p else []
    for warper in chain:
        scores = warper(None, scores)
    np.testing.assert_array_equal(survivors(settings, logits()), np.isfinite(scores.numpy()))


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(1).integers(0, V, (4, 9))
    seen = np.zeros((4, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits()))
    np.testing.assert_allclose(penalise(logits(), seen, np.float32(1.3)), want.numpy(), rtol=1e-6)


def draw(settings: Sampling, rows: np.ndarray, seeds: list[int], positions: list[int]) -> np.ndarray:
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    plan = settings.plan(rows.shape[1])
    return np.asarray(sample(rows, keys, jnp.asarray(positions), None, settings.values(), plan))


def expected(settings: Sampling, scores: np.ndarray) -> np.ndarray:
    """The distribution float64 [V] that a token is drawn from, written down anew."""
    p = np.exp((scores - scores.max()) / settings.temperature, dtype=np.float64)
    order = np.argsort(-p)
    kept = order[: settings.top_k or V]
    p[np.setdiff1d(order, kept)] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= settings.top_p]] = 0
    p[p < settings.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [Sampling(0.8), Sampling(0.8, top_k=10), Sampling(1.0, top_p=0.9), Sampling(1.0, min_p=0.2)]
    + [Sampling(1.0, top_k=12, min_p=0.1), Sampling(0.9, 20, 0.8, 0.15)],
)
def test_draws_follow_the_distribution(settings: Sampling) -> None:
    n = 20_000
    rows = np.repeat(logits(1), n, axis=0)
    tokens = draw(settings, rows, [7] * n, list(range(n)))
    p = expected(settings, logits(1)[0])
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    big = p * n > 5
    chi2 = np.sum((counts[big] - n * p[big]) ** 2 / (n * p[big]))
    # Mean of chi-square is its degrees of freedom, its deviation sqrt(2 dof): five deviations.
    assert chi2 < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_a_mass_that_is_reached_exactly_is_enough() -> None:
    """Probabilities of 1/4 each, which floats hold exactly: half of the mass is two tokens."""
    import torch
    from transformers.generation.logits_process import TopPLogitsWarper

    scores = np.full((1, V), -np.inf, np.float32)
    scores[0, [3, 7, 20, 41]] = 0.0
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        left = filtered(scores, None, Sampling(1.0, top_p=top_p).values(), Plan(False, False, V))
        want = TopPLogitsWarper(top_p)(torch.zeros(0), torch.tensor(scores)) if top_p < 1 else torch.tensor(scores)
        assert np.isfinite(left).sum() == kept == int(torch.isfinite(want).sum())


def test_the_finest_settings_are_greedy() -> None:
    best = logits().argmax(-1)
    for settings in (Sampling(1e-6), Sampling(1.0, top_p=1e-6), Sampling(1.0, top_k=1), Sampling(1.0, min_p=1.0)):
        np.testing.assert_array_equal(draw(settings, logits(), [5] * 4, [9] * 4), best)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    settings, rows = Sampling(1.0, top_k=40), logits()
    together = draw(settings, rows, [1, 2, 3, 4], [10, 11, 12, 13])
    for i in range(4):
        assert draw(settings, rows[i : i + 1], [i + 1], [10 + i])[0] == together[i]
    many = draw(settings, np.repeat(rows[:1], 64, axis=0), [1] * 64, list(range(64)))
    assert len(set(many.tolist())) > 3


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "min_p": 0.05}, {"top_k": 1}])
def test_candidates_alone_give_the_draw_of_the_whole_vocabulary(settings: dict) -> None:
    B = 512
    scores = jnp.asarray(logits(B))
    keys, at = jax.random.split(jax.random.key(0), B), jnp.arange(B)
    sampling = Sampling(temperature=1.2, **settings)
    values, plan = sampling.values(), sampling.plan(V)
    want = draw_keyed(filtered(scores, None, values, plan), keys, at)
    np.testing.assert_array_equal(sample(scores, keys, at, None, values, plan), want)


def test_greedy_takes_the_best() -> None:
    np.testing.assert_array_equal(draw(Sampling(), logits(), [0] * 4, [0] * 4), logits().argmax(-1))


def test_plans() -> None:
    assert Sampling(top_k=5).plan(V) == Plan(True, False, 0)
    assert Sampling(1.0).plan(V) == Plan(False, False, 0)
    assert Sampling(1.0, top_k=500).plan(V) == Plan(False, False, V)
    assert Sampling(1.0, top_k=5).plan(V) == Sampling(1.0, top_k=8).plan(V) == Plan(False, False, 8)
    assert Sampling(1.0, top_p=0.5, repetition_penalty=1.1).plan(V) == Plan(False, True, V)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"temperature": "1"},
        {"top_k": 2.5},
        {"top_k": float("inf")},
        {"top_p": None},
        {"temperature": 10**400},
        {"temperature": 1e-7},
        {"top_p": 1e-7},
        {"repetition_penalty": 1e-4},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
