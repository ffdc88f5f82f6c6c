"""The configuration of omni-nano: read by the project, small enough, with words that can be spelled."""

from math import prod

from omni_jax.config import OmniConfig
from scripts.nano.config import nano_config, nano_tokenizer
from scripts.nano.senses import wordings
from scripts.nano.words import NOUNS, NUMBERS
from scripts.small.tensors import tensor_shapes


def test_it_is_a_small_qwen3_omni() -> None:
    tokenizer = nano_tokenizer(wordings())
    config = nano_config(tokenizer)
    read = OmniConfig.from_hf(config)
    assert read.talker is not None and read.talker.num_code_groups == 16 and read.code2wav is not None
    assert read.thinker.text.vocab_size >= tokenizer.get_vocab_size()
    assert 2 * sum(prod(shape) for shape in tensor_shapes(config).values()) < 10_000_000


def test_numbers_are_tokens_and_nouns_are_spelled() -> None:
    tokenizer = nano_tokenizer(wordings())
    for word in NUMBERS:
        assert len(tokenizer.encode(f" {word}").ids) == 1 == len(tokenizer.encode(word.capitalize()).ids)
    pieces = {noun: tokenizer.encode(f" {noun}").tokens for noun in NOUNS}
    assert sum(len(tokens) > 1 for tokens in pieces.values()) > 0.9 * len(NOUNS), pieces
