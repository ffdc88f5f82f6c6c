"""Text to token ids and back: a checkpoint's `tokenizer.json`, and decoding piece by piece.

Second station of a prompt: `prompt.py` renders messages to text, this turns the text into ids; generated ids come back
through `decode` or, while they are being made, through a `TextStream`. Encoding is the `tokenizers` library's. Decoding
is a table of bytes per token, which makes a stream exact and linear: its pieces are the bytes of `decode`, cut where
characters end.

Source: HF `PreTrainedTokenizerFast`. Deliberate differences: a text that is no valid Unicode, and a tokenizer that does
not fit the model's embedding, are errors with a remedy.
"""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError, InputError


class Tokenizer:
    """The byte-level BPE tokenizer of a checkpoint directory.

    size: highest token id + 1. special: literals of control tokens (chat turns, media placeholders), which decoding
    drops. added: those and the visible ones (`<think>`, `<tool_call>`), longest first.
    """

    def __init__(self, directory: str | Path):
        self._backend = _load(Path(directory) / "tokenizer.json")
        tokens = dict(self._backend.get_added_tokens_decoder())
        self._special_ids = frozenset(i for i, t in tokens.items() if t.special)
        self.added = tuple(sorted((t.content for t in tokens.values()), key=len, reverse=True))
        self.special = tuple(sorted((tokens[i].content for i in self._special_ids), key=len, reverse=True))
        self.size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._bytes: dict[int, bytes] = {}

    def check_rows(self, rows: int) -> None:
        """Raise CheckpointError if the embedding's `rows` do not hold every token; spare rows are legal."""
        if self.size > rows:
            raise CheckpointError(
                f"tokenizer.json has token ids up to {self.size - 1}, the model's embedding has {rows} rows; "
                "take both files from the same checkpoint"
            )

    def token_id(self, literal: str) -> int:
        """The id of one token given by its exact spelling, e.g. "<|im_end|>"; CheckpointError if there is none."""
        found = self._backend.token_to_id(literal)
        if found is None:
            raise CheckpointError(f"tokenizer.json has no token {literal!r}; is this a Qwen3-Omni tokenizer?")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which literals of added tokens become those tokens."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text: literals of added tokens are spelled out."""
        backend, text = self._backend, _checked(text)
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder for ids that arrive one after another."""
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes that one token stands for: none for a special token (unless kept) or for a spare row's id."""
        i = int(token_id)
        if i < 0:
            raise InputError(f"token id {i} is negative; cut padding off before decoding")
        if skip_special and i in self._special_ids:
            return b""
        if i not in self._bytes:
            self._bytes[i] = _spelling_to_bytes(self._backend.id_to_token(i) or "")
        return self._bytes[i]


class TextStream:
    """Decodes ids as they come: whole characters only, and the joined pieces equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; an unfinished character waits for its remaining bytes."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(i, self._skip_special) for i in ids))

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD, or nothing. The stream can then be used again."""
        return self._decoder.decode(b"", final=True)


def _load(path: Path) -> Any:
    """The `tokenizers` object of a file, without the truncation and padding that the file may ask for."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; copy tokenizer.json from the original checkpoint")
    try:
        backend = Backend.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer file ({e}); copy it again from the original checkpoint") from e
    if not isinstance(backend.decoder, ByteLevel):
        raise CheckpointError(f"{path} is no byte-level tokenizer; Qwen3-Omni's is")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"the text holds {text[e.start]!r} at character {e.start}, half of a surrogate pair and no character; "
            "decode it with errors='replace' first"
        ) from e
    return text


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if printable, else the next from U+0100."""
    printable = re.compile(r"[!-~\u00a1-\u00ac\u00ae-\u00ff]")
    alphabet, free = {}, 0x100
    for byte in range(256):
        if printable.match(chr(byte)):
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(free)] = byte
            free += 1
    return alphabet


_ALPHABET = _byte_alphabet()


def _spelling_to_bytes(spelling: str) -> bytes:
    """A vocabulary entry's bytes; an entry outside the alphabet (an added token with a space) is its own UTF-8."""
    if all(c in _ALPHABET for c in spelling):
        return bytes(_ALPHABET[c] for c in spelling)
    return spelling.encode("utf-8")
