"""Speech to train on, and the losses and gradients that transformers gives for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.inputs.messages import read_conversation
from omni_jax.inputs.prompt import prompt_ids
from omni_jax.omni import Omni
from omni_jax.train.codes import Codebooks
from omni_jax.train.losses.talker import LossWeights
from omni_jax.train.talker_batch import SpeechBatch, speech_batch
from omni_jax.train.talker_data import SpeechRecipe, SpeechSample
from tests.parity import reference_inputs


@dataclass
class SpeechExample:
    """A reply that is spoken: the conversation before it, its text, codes int32 [Q, F], the speaker and its row."""

    messages: list[dict]
    reply: str
    codes: np.ndarray
    speaker: str = "ethan"
    where: str = "d:1"


def recipe_of(omni: Omni, max_length: int = 1024, **settings: Any) -> SpeechRecipe:
    return SpeechRecipe(omni.processor, omni.config, Codebooks.of(omni.config), max_length, **settings)


def batch_of(omni: Omni, examples: Sequence[SpeechExample], rows: int | None = None) -> SpeechBatch:
    """The batch of examples, whose media may be arrays, and of rows of padding behind them."""
    tokenizer, template, samples = omni.processor.tokenizer, omni.processor.template, []
    for example in examples:
        conversation = read_conversation(example.messages)
        ids = np.array(prompt_ids(conversation, template, tokenizer), np.int32)
        spoken = np.array(tokenizer.encode_plain(example.reply), np.int32)
        media = tuple(conversation.media)
        samples.append([SpeechSample(ids, media, spoken, example.codes, example.speaker, 0, example.where)])
    return speech_batch(recipe_of(omni).collate(samples, rows or len(examples), 0))


@dataclass
class Losses:
    """The weighted sum, whose gradients are in the reference's parameters, and each loss by its name."""

    total: float
    losses: dict[str, float]


def random_codes(omni: Omni, frames: int, seed: int) -> np.ndarray:
    """Codes int32 [Q, frames]."""
    talker = omni.config.talker
    assert talker is not None
    size = (talker.num_code_groups, frames)
    return np.random.default_rng(seed).integers(0, talker.code_predictor.vocab_size, size, np.int32)


def reference_losses(model: Any, omni: Omni, examples: Sequence[SpeechExample], weights: LossWeights) -> Losses:
    """What transformers' `labels` give for each example alone, as sums over the examples, with gradients.

    The auxiliary loss is that of all rows together, times the number of first codes.
    """
    import torch
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

    model.talker.zero_grad()
    # transformers reads this for labels, although no configuration has it.
    model.talker.config.vocab_size = model.talker.config.text_config.vocab_size
    first: Any = 0.0
    others: Any = 0.0
    routed, count = [], 0
    for example in examples:
        row = _row(model, omni, example)
        first, others = first + row[0], others + row[1]
        routed.append(row[2])
        count += example.codes.shape[1] + 1
    config = model.talker.config.text_config
    logits: Any = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
    auxiliary: Any = count * load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok)
    assert weights.router is not None
    total = weights.talker * first + weights.predictor * others + weights.router * auxiliary
    total.backward()
    losses = {"talker_loss": first.item(), "predictor_loss": others.item(), "auxiliary_loss": auxiliary.item()}
    return Losses(total.item(), losses)


def _row(model: Any, omni: Omni, example: SpeechExample) -> tuple[Any, Any, Any]:
    """Sums of both losses of one example, and its router logits by layer."""
    import torch

    talker, Q = model.talker, example.codes.shape[0]
    codes = torch.tensor(example.codes).long()
    prompt, trailing, pad, ids, inputs = _prompt(model, omni, example)
    frames, text = codes.shape[1], torch.cat([trailing, pad.expand(1, codes.shape[1], -1)], dim=1)
    tables = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
    embedded = torch.stack([table(row) for table, row in zip(tables, codes, strict=True)], dim=1)  # [F, Q, D]
    spoken = embedded.sum(1)[None] + text[:, :frames]
    x = torch.cat([prompt, spoken, torch.zeros_like(pad)], dim=1)  # the last column only has a label
    U = prompt.shape[1]
    labels = torch.full(x.shape[:2], -100)
    labels[0, U:] = torch.cat([codes[0], torch.tensor([talker.config.codec_eos_token_id])])
    ids = torch.cat([ids, ids[:, -1:].expand(1, frames + 1)], dim=1)
    media = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "video_second_per_grid") if k in inputs}
    if "feature_attention_mask" in inputs:
        media["audio_feature_lengths"] = inputs["feature_attention_mask"].sum(1)
    talker.rope_deltas = None
    with _watched([talker.model, *(layer.mlp.gate for layer in talker.model.layers)]) as seen:
        out = talker(inputs_embeds=x, talker_input_ids=ids, labels=labels, use_cache=False, **media)
    hidden, *routed = seen
    states = hidden.last_hidden_state[0, U - 1 : U - 1 + frames]
    others = sum(_residual(talker.code_predictor, states, embedded, codes, i) for i in range(Q - 1)) / (Q - 1)
    # The column that only has a label asks experts too, and is not there when the model speaks.
    return out.loss * (frames + 1), others, [router[0][:-1] for router in routed]


@contextmanager
def _watched(modules: list[Any]) -> Iterator[list[Any]]:
    """What each module gives in its one call."""
    seen: list[Any] = []
    hooks = [module.register_forward_hook(lambda module, args, out: seen.append((module, out))) for module in modules]
    ordered: list[Any] = []
    try:
        yield ordered
    finally:
        for hook in hooks:
            hook.remove()
    ordered += [next(out for module, out in seen if module is wanted) for wanted in modules]


def _residual(predictor: Any, states: Any, embedded: Any, codes: Any, i: int) -> Any:
    """The sum over frames of the cross entropy of code i + 1, by the reference's labels without their shift."""
    import torch

    x = torch.cat([states[:, None], embedded[:, : i + 1]], dim=1)
    labels = torch.full(x.shape[:2], -100)
    labels[:, -1] = codes[i + 1]
    out = predictor(inputs_embeds=x, labels=labels, shift_labels=labels, use_cache=False)
    assert out.generation_steps == i + 1
    return out.loss * codes.shape[1]


def _prompt(model: Any, omni: Omni, example: SpeechExample) -> tuple[Any, ...]:
    """The reference's own inputs: prompt [1, U, D], trailing text, padding, ids for positions, the Thinker's inputs."""
    import torch

    talker, config = model.talker, model.config
    batch = omni.prepare(example.messages)
    inputs = reference_inputs(omni.processor, [example.messages], batch)
    spoken = omni.processor.tokenizer.encode_plain(example.reply)
    ids = torch.cat([inputs["input_ids"], torch.tensor([spoken])], dim=1)
    with torch.no_grad():
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        states = model.thinker(**given, output_hidden_states=True).hidden_states
    embed, hidden = states[0], states[config.talker_config.accept_hidden_layer]
    thinker = config.thinker_config
    media = torch.tensor([thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id])
    is_medium = torch.isin(ids, media)
    T = inputs["input_ids"].shape[1]
    starts = torch.nonzero(inputs["input_ids"][0] == config.im_start_token_id).flatten().tolist()
    users = [
        slice(a, b) for a, b in zip(starts, [*starts[1:], T], strict=True) if ids[0, a + 1] == config.user_token_id
    ]
    parts = [model._get_talker_user_parts(s.start, s.stop, is_medium, hidden, embed) for s in users]
    special = torch.tensor([[config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id]])
    bos, eos, pad = talker.text_projection(model.thinker.get_input_embeddings()(special).detach()).chunk(3, dim=1)
    speaker = config.talker_config.speaker_id[example.speaker.lower()]
    answer, answer_ids, trailing = model._get_talker_assistant_parts(
        starts[-1], ids.shape[1], speaker, embed, pad, bos, eos
    )
    placed = torch.cat([*(ids[:, s] for s in users), answer_ids], dim=1)
    return torch.cat([*parts, answer], dim=1), trailing, pad, placed, inputs
