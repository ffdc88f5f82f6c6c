"""A checkpoint's vocabulary, as it is published or as it is saved, and the byte-level BPE tokenizer made from it.

    tokenizer.json                                                           one file, as `save_pretrained` writes it
    vocab.json, merges.txt, tokenizer_config.json (or added_tokens.json)     the parts, as the model is published

In both cases only tokens and merges are taken from the files. The steps before (NFC, the split into words, one letter
per byte) belong to the model and are built here; a tokenizer.json with other steps belongs to another model. So no
regular expression of an untrusted file ever runs over a prompt.

Source: HF `Qwen2Tokenizer`, the class that the published checkpoint names, and `TokenizersBackend`, which adds tokens.
Deliberate differences: ids that the files state differently, and a vocabulary with holes, are errors with a remedy.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError
from omni_jax.files import parse_json, read_bytes, read_object, read_text, reason_of

SAVED, TOKENS, MERGES, SETTINGS, ADDED = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"
)  # fmt: skip
REMEDY = "take the tokenizer's files from one and the same checkpoint"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_ADDED = 1000  # added tokens, all of which are searched in every text; Qwen3-Omni has 33
MAX_LENGTH = 1000  # characters of one token; the longest of Qwen3-Omni has 128
# Settings that change ids, and the values that tokenizer.json must have, if it states them.
_SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DEFAULT_TOKEN = "<|endoftext|>"  # the reference's default for a role that tokenizer_config.json does not state
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before all others; `id` is None where it follows from the order in the files."""

    content: str
    id: int | None
    flags: dict[str, bool]


@dataclass(frozen=True)
class Vocabulary:
    """The contents of a tokenizer: spellings and their ids, pairs of spellings to merge, in order, and added tokens.

    path: the file of the spellings, for errors.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedToken]
    path: Path


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files of a directory's tokenizer; CheckpointError names what is missing and where to get it."""
    if (saved := directory / SAVED).is_file():
        return (saved,)
    parts = [directory / TOKENS, directory / MERGES]
    settings = [directory / name for name in (SETTINGS, ADDED) if (directory / name).is_file()]
    missing = [path.name for path in parts if not path.is_file()] + [SETTINGS] * (not settings)
    if missing:
        raise CheckpointError(
            f"{directory} has no tokenizer: neither {SAVED} nor, of the files that can replace it, "
            f"{' and '.join(missing)}; copy {'them' if missing[1:] else 'it'} from the published checkpoint"
        )
    return (*parts, *settings)


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a directory, checked: from tokenizer.json, or else from its parts."""
    files = tokenizer_files(directory)
    vocabulary = _saved(files[0]) if files[0].name == SAVED else _published(directory)
    _check(vocabulary)
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary) -> Any:
    """The `tokenizers` object of a vocabulary; CheckpointError if an added token gets another id than is stated."""
    from tokenizers import AddedToken as Added
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        backend: Any = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges, fuse_unk=False))
        backend.add_tokens([Added(token.content, **token.flags) for token in vocabulary.added])
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{vocabulary.path}: no vocabulary ({reason_of(error)}); {REMEDY}") from None
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    for token in vocabulary.added:
        if token.id is not None and backend.token_to_id(token.content) != token.id:
            raise CheckpointError(
                f"{vocabulary.path.parent}: the added token {token.content[:80]!r} is stated with the id {token.id}; "
                f"added to the {len(vocabulary.ids)} tokens of {vocabulary.path.name} it gets "
                f"{backend.token_to_id(token.content)}; {REMEDY}"
            )
    return backend


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if printable, else the next free from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _saved(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json."""
    values = parse_json(read_bytes(path, remedy=REMEDY), str(path), remedy=REMEDY)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{path} is not the file of a byte-level BPE tokenizer, as Qwen3-Omni's is; {REMEDY}")
    _check_pipeline(values, path)
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(f"{path}: 'added_tokens' is not a list of objects; {REMEDY}")
    tokens = sorted((_added(token, token.get("id"), path) for token in added), key=lambda token: token.id or 0)
    if not isinstance(merges := model.get("merges"), list):
        raise CheckpointError(f"{path}: 'merges' is not a list; {REMEDY}")
    return Vocabulary(model.get("vocab", {}), _pairs(merges, path), tokens, path)


def _check_pipeline(values: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless the steps around a saved model are the ones that are built here."""
    model, steps = values["model"], values.get("pre_tokenizer")
    inner = steps.get("pretokenizers") if isinstance(steps, dict) and steps.get("type") == "Sequence" else None
    fits = {
        "decoder": _says(values.get("decoder"), {"type": "ByteLevel"}),
        "normalizer": _says(values.get("normalizer"), {"type": "NFC"}),
        "pre_tokenizer": isinstance(inner, list) and len(inner) == 2 and all(map(_says, inner, (_SPLIT, _BYTES))),
        "model": not any(
            model.get(key)
            for key in (
                "dropout",
                "unk_token",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "byte_fallback",
                "ignore_merges",
            )
        ),
    }
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise CheckpointError(
            f"{path}: '{wrong[0]}' is not that of the byte-level tokenizer of Qwen3-Omni, so other ids would come out; "
            "take the tokenizer's files from a Qwen3-Omni checkpoint"
        )


def _says(values: Any, expected: dict[str, Any]) -> bool:
    return isinstance(values, dict) and all(values.get(key, expected[key]) == expected[key] for key in expected)


def _published(directory: Path) -> Vocabulary:
    """The vocabulary of vocab.json, merges.txt and the file that states the added tokens."""
    path, merges = directory / TOKENS, directory / MERGES
    lines = [line.rstrip("\r") for line in read_text(merges, remedy=REMEDY).split("\n")]
    pairs = _pairs([line for line in lines if line and not line.startswith("#version")], merges)
    return Vocabulary(read_object(path, remedy=REMEDY), pairs, _added_tokens(directory), path)


def _added_tokens(directory: Path) -> list[AddedToken]:
    """The added tokens beside a vocab.json, in the order of their ids; those with a role are special."""
    settings = _optional(directory / SETTINGS)
    stated = settings.get("added_tokens_decoder")
    if stated is not None:
        where = directory / SETTINGS
        if not isinstance(stated, dict) or not all(i.isascii() and i.isdigit() and len(i) < 11 for i in stated):
            raise CheckpointError(f"{where}: 'added_tokens_decoder' is not an object of ids and tokens; {REMEDY}")
        tokens = [_added(token, int(i), where) for i, token in stated.items()]
    else:
        where, settings = directory / ADDED, settings | _optional(directory / "special_tokens_map.json")
        ids = read_object(where, remedy=f"{directory / SETTINGS} has no 'added_tokens_decoder' either; {REMEDY}")
        special = set(_roles(settings))
        tokens = [
            _added({"content": text, "special": text in special, "normalized": text not in special}, i, where)
            for text, i in ids.items()
        ]
    tokens.sort(key=lambda token: token.id or 0)
    known = {token.content: token.id for token in tokens}
    plain = dict.fromkeys(_FLAGS, False) | {"special": True}
    roles = dict.fromkeys(_roles(settings))  # in order, each once
    tokens = [AddedToken(t.content, t.id, plain) if t.content in roles else t for t in tokens]
    return tokens + [AddedToken(text, None, plain) for text in roles if text not in known]


def _roles(settings: dict[str, Any]) -> Iterable[str]:
    """The tokens that settings give a role ("eos_token", "image_token"), which makes them special."""
    defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _DEFAULT_TOKEN)
    named = [value for key, value in (defaults | settings).items() if key in _ROLES or key.endswith("_token")]
    extra = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    extra = [v.values() if isinstance(v, dict) else v if isinstance(v, list) else [] for v in extra]
    for value in chain(named, *extra):
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            yield text


def _added(token: Any, token_id: Any, where: Path) -> AddedToken:
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not content or type(token_id) is not int:
        raise CheckpointError(f"{where}: an added token without a text or a whole number as its id; {REMEDY}")
    flags = {name: token.get(name, False) for name in _FLAGS} | {"normalized": token.get("normalized", True)}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{where}: the added token {content[:80]!r} has a flag that is not a boolean; {REMEDY}")
    return AddedToken(content, token_id, flags)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, remedy=REMEDY) if path.is_file() else {}


def _pairs(merges: list[Any], where: Path) -> list[tuple[str, str]]:
    """Merges as pairs; files write them as "a b" or ["a", "b"]."""
    pairs: list[Any] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise CheckpointError(f"{where}: merge {number} is not a pair of two tokens; {REMEDY}")
    return [(left, right) for left, right in pairs]


def _check(vocabulary: Vocabulary) -> None:
    """Raise CheckpointError unless each byte has a token, each id from 0 up one token, and each merge its tokens."""
    ids, path = vocabulary.ids, vocabulary.path
    if not isinstance(ids, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in ids.values()):
        raise CheckpointError(f"{path}: the vocabulary is not an object of tokens and ids from 0 up; {REMEDY}")
    letters = byte_alphabet()
    if missing := [byte for letter, byte in letters.items() if letter not in ids]:
        raise CheckpointError(f"{path}: no token for {len(missing)} bytes, 0x{min(missing):02x} the first; {REMEDY}")
    if len(set(ids.values())) < len(ids):
        twice = Counter(ids.values()).most_common(1)[0][0]
        names = [repr(token[:40]) for token, i in ids.items() if i == twice][:2]
        raise CheckpointError(f"{path}: the tokens {' and '.join(names)} have the same id {twice}; {REMEDY}")
    if max(ids.values()) >= len(ids):
        raise CheckpointError(
            f"{path}: {len(ids)} tokens with ids up to {max(ids.values())}, some are missing; {REMEDY}"
        )
    texts = [*ids, *(token.content for token in vocabulary.added)]
    if len(vocabulary.added) > MAX_ADDED or max(map(len, texts)) > MAX_LENGTH:
        raise CheckpointError(
            f"{path}: {len(vocabulary.added):,} added tokens, the longest of all tokens has {max(map(len, texts)):,} "
            f"characters; at most {MAX_ADDED:,} and {MAX_LENGTH:,} are read, {REMEDY}"
        )
    if re.search("[\ud800-\udfff]", "".join(texts)):
        raise CheckpointError(f"{path}: a token holds half of a surrogate pair, which is not a character; {REMEDY}")
    for number, (left, right) in enumerate(vocabulary.merges, 1):
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{path}: merge {number} joins {left[:40]!r} and {right[:40]!r}, and one of the three tokens is not in "
                f"the vocabulary; {REMEDY}"
            )
    reached = {*letters, *(left + right for left, right in vocabulary.merges), *(t.content for t in vocabulary.added)}
    if unreached := sorted(ids.keys() - reached):
        raise CheckpointError(
            f"{path}: no merge makes {len(unreached):,} of its tokens, such as {unreached[0][:40]!r}, so text would "
            f"become other ids; {REMEDY}"
        )
