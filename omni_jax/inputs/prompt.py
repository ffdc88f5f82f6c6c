"""From a checked conversation to token ids: chat template, literals that stay text, placeholders at full length.

    messages -> [messages.py] -> conversation -> render -> encode -> one placeholder per medium -> expand -> token ids

`<|im_end|>` or `<|audio_pad|>` in a message, a tool's result or a tool's schema is text, not a control token. Before
the template runs, such literals are replaced by single private-use characters, which no template can split or join;
afterwards they are encoded as ordinary text. Everything else is tokenised as usual.

Source: HF `encode_marked_chat` (the reference's optional protection, whose ids these are) and
`Qwen3OmniMoeProcessor.replace_*_token` (the expansion). Deliberate differences: protection is not optional, covers keys
of tool schemas and literals split over several text parts, and forbids all added tokens in tool results, the visible
ones (`</tool_response>`) too; placeholders and media that do not match are errors.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.inputs.messages import Conversation
from omni_jax.inputs.positions import MediaItem
from omni_jax.inputs.template import ChatTemplate
from omni_jax.inputs.tokenizer import Tokenizer

AUDIO_END = "<|audio_end|>"
PRIVATE_USE = range(0xE000, 0xF900)


def prompt_ids(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
) -> list[int]:
    """The token ids of a conversation, with a single placeholder for each medium.

    add_generation_prompt: end with the beginning of an answer. enable_thinking: passed to the template if not None.
    """
    text, shield = rendered(
        conversation,
        template,
        tokenizer,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
    )
    return shield.encode(text)


def rendered(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
    enable_thinking: bool | None,
) -> tuple[str, "Shield"]:
    """The text of a conversation, in which only the template wrote control tokens, and what encodes it."""
    said = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
    shield = Shield(tokenizer, said + template.source)
    text = template.render(
        [shield.hide_message(message) for message in conversation.messages],
        None if conversation.tools is None else shield.hide(conversation.tools),
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
    )
    return text, shield


def expand(
    token_ids: Sequence[int], items: Sequence[MediaItem], tokenizer: Tokenizer, config: ThinkerConfig
) -> np.ndarray:
    """Repeat each medium's placeholder for each of its tokens: ids int32 [T]; InputError if they do not match."""
    kinds = {config.image_token_id: "image", config.video_token_id: "video", config.audio_token_id: "audio"}
    found = [kinds[i] for i in token_ids if i in kinds]
    if found != [item.kind for item in items]:
        raise InputError(
            f"the chat template wrote placeholders for {_count(found)}, the messages hold "
            f"{_count([item.kind for item in items])}; the template does not fit Qwen3-Omni or drops some of them"
        )
    queue = iter(items)
    pieces = [_expanded(next(queue), tokenizer, config) if i in kinds else [i] for i in token_ids]
    return np.array([i for piece in pieces for i in piece], np.int32)


def _expanded(item: MediaItem, tokenizer: Tokenizer, config: ThinkerConfig) -> list[int]:
    """The placeholder ids of one medium."""
    sound = [config.audio_token_id] * item.audio_tokens
    if item.grid is None:
        return sound
    t, h, w = item.grid
    frame = [config.video_token_id if item.kind == "video" else config.image_token_id]
    frame *= h * w // config.vision.spatial_merge_size**2
    if not item.audio_tokens:
        return frame * t
    # A frame precedes the first sound token that begins no earlier. In float64, as in the reference.
    starts = np.ceil(np.arange(t) * item.seconds_per_grid * config.position_id_per_seconds)
    ids, at = [config.audio_start_token_id], 0
    for cut in np.minimum(starts, item.audio_tokens).astype(int).tolist():
        ids += sound[at:cut] + frame
        at = cut
    return ids + sound[at:] + [tokenizer.token_id(AUDIO_END)]


def _count(kinds: list[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(kinds).items())) or "no media"


def expanded_size(item: MediaItem, config: ThinkerConfig) -> int:
    """The number of tokens that `expand` puts in the place of a medium's placeholder."""
    if item.grid is None:
        return item.audio_tokens
    marks = 2 if item.audio_tokens else 0
    return math.prod(item.grid) // config.vision.spatial_merge_size**2 + item.audio_tokens + marks


class Shield:
    """Replaces literals of added tokens in one conversation by private-use characters that do not occur in it."""

    def __init__(self, tokenizer: Tokenizer, taken: str):
        self._tokenizer = tokenizer
        self._free = (c for c in map(chr, PRIVATE_USE) if c not in taken)
        self._covers: dict[str, str] = {}  # literal -> character
        self._special, self._added = _pattern(tokenizer.special), _pattern(tokenizer.added)

    def hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with its literals hidden: of all added tokens in a tool's result, else of the special ones."""
        pattern = self._added if message["role"] == "tool" else self._special
        if isinstance(message["content"], list):
            message = message | {"content": list(_join_split_literals(message["content"], pattern))}
        return self._hide(message, pattern)

    def hide(self, value: Any) -> Any:
        """Plain JSON values with the literals of special tokens hidden, in keys too."""
        return self._hide(value, self._special)

    def _hide(self, value: Any, pattern: re.Pattern) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: self._cover(found[0]), value)
        if isinstance(value, dict):
            return {self._hide(key, pattern): self._hide(item, pattern) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hide(item, pattern) for item in value]
        return value

    def _cover(self, literal: str) -> str:
        if literal not in self._covers:
            free = next(self._free, None)
            if free is None:
                raise InputError("the conversation uses every private-use character (U+E000 to U+F8FF); remove some")
            self._covers[literal] = free
        return self._covers[literal]

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered prompt; hidden literals become ordinary text, each on its own."""
        literals = {cover: literal for literal, cover in self._covers.items()}
        pieces = re.split(f"([{''.join(literals)}])", text) if literals else [text]
        encoded = (
            self._tokenizer.encode_plain(literals[piece]) if piece in literals else self._tokenizer.encode(piece)
            for piece in pieces
        )
        return [i for ids in encoded for i in ids]


@cache
def _pattern(literals: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, literals)) or "(?!)")


def _join_split_literals(parts: list[dict[str, Any]], pattern: re.Pattern) -> Iterator[dict[str, Any]]:
    """Join neighbouring text parts that contain a literal only together; templates join them in any case."""
    for kind, group in itertools.groupby(parts, key=lambda part: part["type"]):
        group = list(group)
        texts = [part["text"] for part in group] if kind == "text" else []
        joined = "".join(texts)
        if len(pattern.findall(joined)) != sum(len(pattern.findall(text)) for text in texts):
            yield {"type": "text", "text": joined}
        else:
            yield from group
