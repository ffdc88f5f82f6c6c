"""Byte-level BPE tokenizers and the chat template of the small random checkpoints.

The tokenizers are trained on the fly: 256 bytes and the merges of a few sentences, after the normaliser and the
pre-tokenizer of the public one, then all of its special tokens. Token ids differ between the variants, so that an id
written into the code as a constant fails a test.
"""

import json
from pathlib import Path
from typing import Any

# The pre-tokenizer's pattern, as in the public tokenizer.json.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    *(
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
        "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
        "<tool_response> </tool_response> <think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> "
        "<tts_text_eod> <tts_text_bos_single> <|audio_pad|>"
    ).split()
]
# Added tokens that decoding keeps.
VISIBLE_TOKENS = frozenset(SPECIAL_TOKENS[14:26])
# Names of ids in config.json -> the token that has the id.
ID_NAMES = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tts_pad": "<tts_pad>",
    "tts_bos": "<tts_text_bos>",
    "tts_eos": "<tts_text_eod>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "audio": "<|audio_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "audio_start": "<|audio_start|>",
    "audio_end": "<|audio_end|>",
}
MEDIA_TOKENS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the other animals look at the picture of the garden.",
    "What do you see in the image, and what do you hear in the audio? Describe the video in one short sentence.",
    "There is a small house by the river; people walk along the water and listen to the music of the morning.",
    "A model that listens, looks, thinks and speaks should answer every question with something that matters.",
)
# The number of tokens before the special ones, how often the training text repeats the role names (which moves their
# ids), and whether the special tokens come in reverse order.
_SHAPES = {
    "tiny": (460, 50, False), "medium": (460, 50, False), "large": (460, 50, False), "small": (420, 6, False),
    "odd": (400, 3, True), "thinking": (460, 50, False),
}  # fmt: skip

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part is string -%}
        {{- part -}}
      {%- elif part.type in ['image', 'image_url'] -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type in ['audio', 'audio_url', 'input_audio'] -%}
        {{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
      {%- elif part.type in ['video', 'video_url'] -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- else -%}
        {{- raise_exception('unknown content part: ' ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(first=0) -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set ns.first = 1 -%}
{%- endif -%}
{%- if tools or ns.first -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if ns.first -%}
    {{- render(messages[0].content) -}}
  {%- endif -%}
  {%- if tools -%}
    {%- if ns.first -%}
      {{- '\\n\\n' -}}
    {%- endif -%}
    {{- '# Tools\\n\\nThese functions can be called, one JSON signature per line:\\n<tools>' -}}
    {%- for tool in tools -%}
      {{- '\\n' ~ (tool | tojson) -}}
    {%- endfor -%}
    {{- '\\n</tools>\\n\\nTo call one, answer with its name and arguments as JSON inside call tags:\\n' -}}
    {{- '<tool_call>\\n{"name": "the function", "arguments": {"parameter": "value"}}\\n</tool_call>' -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages[ns.first:] -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' ~ render(message.content) ~ '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}
      {{- '<|im_end|>\\n' -}}
    {%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function or call -%}
      {%- if message.content or not loop.first -%}
        {{- '\\n' -}}
      {%- endif -%}
      {{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
      {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


# That of a model which thinks: the prompt opens the reply's reasoning or, where nobody wants any, closes it at once.
THINKING_TEMPLATE = (
    CHAT_TEMPLATE
    + """\
{%- if add_generation_prompt -%}
  {{- '<think>\\n' if enable_thinking is not defined or enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
"""
)


def build_tokenizer(variant: str) -> Any:
    """A `tokenizers.Tokenizer` for a variant, the same at every call."""
    size, repeats, reverse = _SHAPES[variant]
    # The role names come often enough to end as one token each; the configuration names their ids.
    texts = ["system", "user", "assistant"] * repeats + list(_SENTENCES)
    return train_tokenizer(texts, size, SPECIAL_TOKENS[::-1] if reverse else SPECIAL_TOKENS)


def train_tokenizer(texts: list[str], size: int, special_tokens: list[str]) -> Any:
    """A `tokenizers.Tokenizer` of `size` tokens that texts are made of, and special ones after them."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Split(Regex(PATTERN), "isolated", False), byte_level]
    )
    tokenizer.post_processor = processors.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    _add_special_tokens(tokenizer, special_tokens)
    return tokenizer


def read_tokenizer(path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def write_tokenizer(directory: Path, tokenizer: Any, template: str = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to a directory."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    settings = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(settings + "\n")


def _add_special_tokens(tokenizer: Any, tokens: list[str]) -> None:
    from tokenizers import AddedToken

    for token in tokens:
        added = AddedToken(token, normalized=False, special=token not in VISIBLE_TOKENS)
        (tokenizer.add_tokens if token in VISIBLE_TOKENS else tokenizer.add_special_tokens)([added])


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Name of an id in config.json (without `_token_id`) -> the id; ValueError for a tokenizer without that token."""
    ids = {name: tokenizer.token_to_id(token) for name, token in ID_NAMES.items()}
    missing = [ID_NAMES[name] for name, i in ids.items() if i is None]
    if missing:
        raise ValueError(f"the tokenizer has no token {missing}; use a tokenizer.json of Qwen3-Omni")
    return ids


def publish(directory: Path) -> None:
    """Rewrite a directory's tokenizer and chat template in the form of the public checkpoint.

    tokenizer.json becomes vocab.json and merges.txt, whose added tokens are those of tokenizer_config.json, and the
    chat template moves to chat_template.json.
    """
    saved, settings, template = (directory / f"{n}.json" for n in ("tokenizer", "tokenizer_config", "chat_template"))
    model = json.loads(saved.read_text("utf-8"))["model"]
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
    saved.unlink()
    values = json.loads(settings.read_text("utf-8"))
    source = values.pop("chat_template", None)
    if (jinja := directory / "chat_template.jinja").is_file():
        source = jinja.read_text("utf-8")
        jinja.unlink()
    if source is not None:
        template.write_text(json.dumps({"chat_template": source}), "utf-8")
        settings.write_text(json.dumps(values), "utf-8")


def tokenizer_config(tokenizer: Any) -> dict:
    """The `tokenizer_config.json` that transformers reads beside tokenizer.json."""
    added = {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
        **MEDIA_TOKENS,
        "extra_special_tokens": MEDIA_TOKENS,
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }
