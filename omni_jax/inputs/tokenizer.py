"""Text to token ids and back: a checkpoint's vocabulary, and incremental decoding.

The second step of a prompt: `prompt.py` renders messages to text, and this module turns the text into ids; generated
ids are decoded by `decode` or, while they are being generated, by a `TextStream`. The `tokenizers` library encodes.
Decoding is a table of bytes per token, which makes a stream exact and linear: its pieces are the bytes of `decode`,
split at ends of characters. Encoding costs about one second per million characters, and at most `MAX_CHARACTERS` are
accepted.

Source: HF `PreTrainedTokenizerFast`. Deliberate differences: a text that is not valid Unicode, and a tokenizer that
does not fit the model's embedding or the ids in its configuration, are errors with a remedy.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.vocabulary import build_tokenizer, byte_alphabet, read_vocabulary

# For one text, more than the longest context can hold. While encoding, each token takes about 450 bytes.
MAX_CHARACTERS = 10_000_000
# Control tokens -> the key of config.json that must state their id. The literals are those of the public
# tokenizer_config.json; tokens with None are written by templates and by the expansion of media.
_CONTROL = {
    "<|im_start|>": "im_start_token_id", "<|im_end|>": "im_end_token_id", "<tts_pad>": "tts_pad_token_id",
    "<tts_text_bos>": "tts_bos_token_id", "<tts_text_eod>": "tts_eos_token_id",
    "<|image_pad|>": "thinker_config.image_token_id", "<|video_pad|>": "thinker_config.video_token_id",
    "<|audio_pad|>": "thinker_config.audio_token_id", "<|vision_start|>": "thinker_config.vision_start_token_id",
    "<|audio_start|>": "thinker_config.audio_start_token_id", "<|vision_end|>": None, "<|audio_end|>": None,
}  # fmt: skip
_ROLES = ("system", "user", "assistant")


class Tokenizer:
    """The byte-level BPE tokenizer of a checkpoint directory.

    size: the highest token id + 1. special: literals of control tokens (chat turns, media placeholders), which decoding
    drops. added: these and the visible ones (`<think>`, `<tool_call>`), longest first.
    """

    def __init__(self, directory: str | Path):
        vocabulary = read_vocabulary(Path(directory))
        self._file, self._backend = vocabulary.path, build_tokenizer(vocabulary)
        tokens = dict(self._backend.get_added_tokens_decoder())
        self._special_ids = frozenset(i for i, t in tokens.items() if t.special)
        self.added = tuple(sorted((t.content for t in tokens.values()), key=len, reverse=True))
        self.special = tuple(sorted((tokens[i].content for i in self._special_ids), key=len, reverse=True))
        self.size = self._backend.get_vocab_size(with_added_tokens=True)
        self._bytes: dict[int, bytes] = {}

    def check_rows(self, rows: int) -> None:
        """Raise CheckpointError if the embedding has fewer `rows` than there are tokens; spare rows are allowed."""
        if self.size > rows:
            raise CheckpointError(
                f"{self._file} has token ids up to {self.size - 1}, the model's embedding has {rows} rows; "
                "take both files from the same checkpoint"
            )

    def check_ids(self, config: OmniConfig) -> None:
        """Raise CheckpointError if a control token is missing, or the id of one or of a role differs from `config`."""
        where = f"{self._file.parent / 'config.json'}; take both files from the same checkpoint"
        for literal in _CONTROL:
            if literal not in self.special:
                raise CheckpointError(
                    f"{self._file}: {literal!r} is not a special token of this tokenizer, but is of Qwen3-Omni's; take "
                    "the tokenizer's files from the same checkpoint as config.json"
                )
        for literal, name in (_CONTROL | {role: f"{role}_token_id" for role in _ROLES}).items():
            if name is None:
                continue
            section, _, key = name.rpartition(".")
            stated = getattr(config.thinker if section else config, key)
            if self.token_id(literal) != stated:
                raise CheckpointError(
                    f"{self._file}: {literal!r} has the id {self.token_id(literal)}, but {name} is {stated} in {where}"
                )

    def token_id(self, literal: str) -> int:
        """The id of the token with this exact spelling, such as "<|im_end|>"; CheckpointError if there is none."""
        found = self._backend.token_to_id(literal)
        if found is None:
            raise CheckpointError(f"{self._file} has no token {literal!r}; is this a Qwen3-Omni tokenizer?")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which literals of added tokens become those tokens."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text: literals of added tokens are spelled out."""
        backend = self._backend
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(_checked(text)))
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token are dropped."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder for ids that arrive one after another."""
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes of one token: empty for a special token that is skipped, and for the id of a spare row."""
        i = int(token_id)
        if i < 0:
            raise InputError(f"token id {i} is negative; cut padding off before decoding")
        if skip_special and i in self._special_ids:
            return b""
        if i not in self._bytes:
            self._bytes[i] = _spelling_to_bytes(self._backend.id_to_token(i) or "")
        return self._bytes[i]


class TextStream:
    """Decodes ids incrementally: returns whole characters only, and the joined pieces equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text completed by `ids`; an incomplete character is held back until its remaining bytes arrive."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(i, self._skip_special) for i in ids))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else an empty text. The stream can then be used again."""
        return self._decoder.decode(b"", final=True)


def _checked(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"a text of {len(text):,} characters; at most {MAX_CHARACTERS:,} are tokenised, shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"the text holds {text[e.start]!r} at character {e.start}, half of a surrogate pair and no character; "
            "decode it with errors='replace' first"
        ) from e
    return text


_ALPHABET = byte_alphabet()


def _spelling_to_bytes(spelling: str) -> bytes:
    """The bytes of a vocabulary entry; one outside the alphabet (an added token with a space) is encoded as UTF-8."""
    if all(c in _ALPHABET for c in spelling):
        return bytes(_ALPHABET[c] for c in spelling)
    return spelling.encode("utf-8")
