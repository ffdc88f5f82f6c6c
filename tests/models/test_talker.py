"""The Talker and its code predictor against transformers, layer stack by layer stack."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_hf
from omni_jax.models.param import bind, declare
from omni_jax.models.talker import Talker
from omni_jax.ops.cache import KVCache
from tests.helpers.arrays import close

VARIANTS = ("tiny", "small", "odd")


@pytest.fixture(scope="module")
def talkers(checkpoints: Callable[[str], Path]) -> Callable[[str], Talker]:
    """`talkers("tiny")` is that checkpoint's Talker with its parameters."""

    @cache
    def load(variant: str) -> Talker:
        params, config = load_hf(checkpoints(variant), parts=("talker",))
        assert config.talker is not None
        return bind(declare(Talker, config.talker), params["talker"])

    return load


def inputs(talker: Talker, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs [B, T, D] of the scale of embeddings, and positions [3, B, T] that differ on all three axes."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((B, T, talker.config.text.hidden_size)).astype(np.float32)
    steps = rng.integers(0, 3, (3, B, T)) + rng.choice([0.0, 0.5], (3, B, T))
    return x, np.cumsum(steps, axis=2).astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_and_logits_equal_the_reference(
    variant: str, talkers: Callable[[str], Talker], reference: Callable[[str], Any]
) -> None:
    import torch

    talker, theirs = talkers(variant), reference(variant).talker
    x, position_ids = inputs(talker, 2, 37)
    with torch.no_grad():
        hidden = theirs.model(inputs_embeds=torch.tensor(x), position_ids=torch.tensor(position_ids)).last_hidden_state
        logits = theirs.codec_head(hidden)
    close(talker.forward(jnp.asarray(x), jnp.asarray(position_ids)).hidden, hidden, 1e-4)
    close(talker(x, position_ids), logits, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_extending_equals_the_whole(variant: str, talkers: Callable[[str], Talker]) -> None:
    talker = talkers(variant)
    x, position_ids = map(jnp.asarray, inputs(talker, 2, 21))
    whole = talker.forward(x, position_ids).hidden
    out = talker.prefill(x[:, :17], position_ids[:, :, :17], talker.empty_cache(2, 32))
    parts = [out.hidden]
    for start, stop in ((17, 18), (18, 21)):
        out = talker.extend(x[:, start:stop], position_ids[:, :, start:stop], out.cache)
        parts.append(out.hidden)
    close(jnp.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_equal_the_reference(
    variant: str, talkers: Callable[[str], Talker], reference: Callable[[str], Any]
) -> None:
    import torch

    talker, theirs = talkers(variant), reference(variant).talker
    x = np.random.default_rng(1).standard_normal((5, talker.config.thinker_hidden_size)).astype(np.float32)
    for name in ("text_projection", "hidden_projection"):
        with torch.no_grad():
            want = getattr(theirs, name)(torch.tensor(x))
        close(getattr(talker, name)(jnp.asarray(x)), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_logits_equal_the_reference(
    variant: str, talkers: Callable[[str], Talker], reference: Callable[[str], Any]
) -> None:
    import torch

    talker, theirs = talkers(variant), reference(variant).talker
    predictor, config = talker.code_predictor, talker.config.code_predictor
    rng, B, Q = np.random.default_rng(2), 3, talker.config.num_code_groups
    hidden = rng.standard_normal((B, config.hidden_size)).astype(np.float32)
    first = rng.integers(0, config.vocab_size, B)
    with torch.no_grad():
        prompt = torch.stack([torch.tensor(hidden), theirs.get_input_embeddings()(torch.tensor(first))], dim=1)
        out = theirs.code_predictor.generate(
            inputs_embeds=prompt,
            max_new_tokens=Q - 1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    cache = KVCache.empty(config.num_layers, B, config.num_kv_heads, Q, config.head_dim, jnp.float32)
    x = jnp.stack([jnp.asarray(hidden), talker.embed_codes(jnp.asarray(first))], axis=1)
    for i, codes in enumerate(out.sequences.numpy().T):
        got = predictor.extend(x, cache)
        cache = got.cache
        close(predictor.logits(got.hidden[:, -1], i), out.logits[i], 1e-4)
        x = predictor.embed_code(jnp.asarray(codes), i)[:, None]
    assert i == Q - 2
