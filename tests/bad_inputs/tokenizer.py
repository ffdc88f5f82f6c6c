"""Vocabularies that are incomplete, damaged or another model's, and chat templates that nobody should run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_configs import config_dict
from tiny_tokenizer import publish

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.vocabulary import REMEDY
from tests.bad_inputs.case import Case

SAVED, TOKENS, MERGES, SETTINGS = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"


def _load(folder: Path) -> None:
    Tokenizer(folder).check_ids(OmniConfig.from_hf(config_dict("tiny")))


def _copy(folder: Path, world: Any) -> None:
    for name in (SAVED, SETTINGS):
        shutil.copyfile(world.hf / name, folder / name)


def _saved(name: str, change: Callable[[dict], Any], *words: str) -> Case:
    """A tokenizer.json whose JSON object `change` has changed, in place or by returning other contents."""

    def act(folder: Path, world: Any) -> None:
        _copy(folder, world)
        values = json.loads((folder / SAVED).read_text())
        (folder / SAVED).write_text(json.dumps(values if (other := change(values)) is None else other))
        _load(folder)

    return Case(f"tokenizer.json: {name}", act, (SAVED, *words), CheckpointError)


def _part(name: str, file: str, change: Callable[[str], str | bytes | None], *words: str) -> Case:
    """The published form, one of whose files has become what `change` makes of its text, or is gone."""

    def act(folder: Path, world: Any) -> None:
        _copy(folder, world)
        publish(folder)
        text = change((folder / file).read_text("utf-8"))
        (folder / file).unlink()
        if text is not None:
            (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)
        _load(folder)

    return Case(f"{file}: {name}", act, words, CheckpointError)


def _exchange(one: str, other: str) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        tokens = {token["content"]: token for token in values["added_tokens"]}
        tokens[one]["content"], tokens[other]["content"] = other, one

    return change


def _drop(content: str) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != content]

    return change


def _flag(literal: str, **flags: Any) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        next(token for token in values["added_tokens"] if token["content"] == literal).update(flags)

    return change


def _vocabulary(text: str, change: Callable[[dict], Any]) -> str:
    values = json.loads(text)
    change(values)
    return json.dumps(values)


def _rename(ids: dict, one: str, other: str) -> None:
    ids[other] = ids.pop(one)


def _last(model: dict) -> str:
    return max(model["vocab"], key=model["vocab"].get)


_WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
_REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_GROW = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}

CASES = [
    _saved("a list", lambda _: [], "byte-level", "same checkpoint"),
    _saved("a number", lambda _: 5, "byte-level"),
    _saved("100 levels deep in the decoder", lambda v: v.update(decoder=json.loads("[" * 101 + "]" * 101)), "too deep"),
    _saved("without a model", lambda v: v.pop("model") and None, "byte-level"),
    _saved("words instead of bytes", lambda v: v.update(model=_WORDS), "byte-level"),
    _saved("Unigram", lambda v: v["model"].update(type="Unigram"), "byte-level"),
    _saved("another decoder", lambda v: v.update(decoder={"type": "Metaspace"}), "'decoder'", "Qwen3-Omni"),
    _saved("a normaliser that lengthens", lambda v: v.update(normalizer=_GROW), "'normalizer'"),
    _saved("a pattern without end", lambda v: v["pre_tokenizer"]["pretokenizers"].insert(0, _REGEX), "'pre_tokenizer'"),
    _saved("no pre-tokenizer", lambda v: v.update(pre_tokenizer=None), "'pre_tokenizer'"),
    _saved("merges left out by chance", lambda v: v["model"].update(dropout=0.5), "'model'"),
    _saved("bytes as fallback", lambda v: v["model"].update(byte_fallback=True), "'model'"),
    _saved("an empty vocabulary", lambda v: v["model"].update(vocab={}), "256 bytes"),
    _saved("a vocabulary that is a list", lambda v: v["model"].update(vocab=[["a", 0]]), "vocabulary"),
    _saved("no letter for a byte", lambda v: v["model"]["vocab"].pop("A") and None, "0x41", "same checkpoint"),
    _saved("an id that is text", lambda v: v["model"]["vocab"].update(A="7"), "ids from 0 up"),
    _saved("an id that is true", lambda v: v["model"]["vocab"].update(A=True), "ids from 0 up"),
    _saved("a negative id", lambda v: v["model"]["vocab"].update(A=-1), "ids from 0 up"),
    _saved("an id of 40 bits", lambda v: v["model"]["vocab"].update(A=2**40), "ids from 0 up"),
    _saved("two tokens of one id", lambda v: v["model"]["vocab"].update(A=v["model"]["vocab"]["B"]), "'A' and 'B'"),
    _saved("merges of unknown tokens", lambda v: v["model"]["merges"].append(["語", "A"]), "merge", "'語' and 'A'"),
    _saved("a merge to no token", lambda v: v["model"]["merges"].append(["~", "}"]), "'~' and '}'"),
    _saved("a merge of three", lambda v: v["model"]["merges"].append("a b c"), "no pair"),
    _saved("a merge of a number", lambda v: v["model"]["merges"].append([1, 2]), "no pair"),
    _saved("merges that are text", lambda v: v["model"].update(merges="a b"), "'merges'"),
    _saved("half a surrogate pair", lambda v: _rename(v["model"]["vocab"], "er", "\ud800"), "surrogate"),
    _saved("a merge gone", lambda v: v["model"]["vocab"].pop(_last(v["model"])) and None, "merge"),
    _saved("<|im_start|> and <|im_end|> exchanged", _exchange("<|im_start|>", "<|im_end|>"),
           "'<|im_start|>'", "id 455", "im_start_token_id is 454", "config.json", "same checkpoint"),
    _saved("image and sound exchanged", _exchange("<|image_pad|>", "<|audio_pad|>"), "'<|image_pad|>'", "config.json"),
    _saved("without added tokens", lambda v: v.update(added_tokens=[]), "'<|im_start|>'", "special token"),
    _saved("without the last added token", _drop("<|audio_pad|>"), "'<|audio_pad|>'"),
    _saved("without an added token in the middle", _drop("<think>"), "id", "same checkpoint"),
    _saved("a control token that is ordinary", _flag("<|im_end|>", special=False), "'<|im_end|>'", "special"),
    _saved("an added token without text", _flag("<think>", content=""), "added token"),
    _saved("an added token whose id is text", _flag("<think>", id="5"), "added token"),
    _saved("a flag that is text", _flag("<think>", lstrip="no"), "'<think>'", "boolean"),
    _saved("added tokens that are a number", lambda v: v.update(added_tokens=5), "'added_tokens'"),
    _part("missing", TOKENS, lambda _: None, "no tokenizer", TOKENS, "copy it from the published checkpoint"),
    _part("missing", MERGES, lambda _: None, "no tokenizer", MERGES, "published"),
    _part("missing", SETTINGS, lambda _: None, "no tokenizer", SETTINGS, "published"),
    _part("without added tokens", SETTINGS, lambda _: "{}", "added_tokens.json", "added_tokens_decoder"),
    _part("added tokens in a list", SETTINGS, lambda _: '{"added_tokens_decoder": []}', "'added_tokens_decoder'"),
    _part("added tokens under names", SETTINGS, lambda _: '{"added_tokens_decoder": {"a": {}}}', "ids and tokens"),
    _part("added tokens from 5,000 digits on", SETTINGS,
          lambda _: '{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "a"}}}', "ids and tokens"),
    _part("not UTF-8", SETTINGS, lambda _: b'{"a": "\xe9"}', SETTINGS, "UTF-8"),
    _part("a page of HTML", TOKENS, lambda _: "<!doctype html>", TOKENS, "no valid JSON"),
    _part("a token twice", TOKENS, lambda text: '{"a": 1, "a": 2}', TOKENS, "'a' occurs twice"),
    _part("a token lost", TOKENS, lambda text: _vocabulary(text, lambda v: _rename(v, "er", "~~~")), "merge"),
    _part("ids with a hole", TOKENS, lambda text: _vocabulary(text, lambda v: v.update(A=9999)), "up to 9999", REMEDY),
    _part("cut within a line", MERGES, lambda text: text[: text.index(" ", 200)], MERGES, "no pair"),
    _part("three on a line", MERGES, lambda text: text + "a b c\n", MERGES, "no pair"),
    _part("a pickle", MERGES, lambda _: b"\x80\x04\x95\x00", MERGES, "UTF-8"),
    _part("another model's", MERGES, lambda text: text + "語 本\n", "merge", "same checkpoint"),
    Case("tokenizer: a negative id", lambda _, world: world.omni.processor.tokenizer.decode([-1]), ("negative",)),
    Case("tokenizer: half a surrogate pair", lambda _, world: world.omni.processor.tokenizer.encode("\ud83d"),
         ("surrogate", "errors='replace'"), InputError),
    Case("tokenizer: 17 million characters", lambda _, world: world.omni.processor.tokenizer.encode("a" * 17_000_000),
         ("17,000,000", "16,000,000", "shorten"), InputError),
]  # fmt: skip
