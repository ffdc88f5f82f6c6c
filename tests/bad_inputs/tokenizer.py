"""Vocabularies that are incomplete, damaged or another model's, and chat templates that nobody should run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs import limits
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.template import JINJA, ChatTemplate
from omni_jax.inputs.template import REMEDY as REMEDY_TEMPLATE
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.vocabulary import REMEDY
from scripts.small.configs import config_dict
from scripts.small.tokenizer import publish
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


_MANY = range(99_999)
_WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
_REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_GROW = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}


def _found(name: str, file: str, data: Any, *words: str) -> Case:
    """A checkpoint whose chat template is looked for: `data` are the bytes of a file, or a value for JSON."""

    def act(folder: Path, _: Any) -> None:
        (folder / file).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        ChatTemplate.from_dir(folder)

    return Case(f"{file}: {name}", act, words, CheckpointError)


def _compiled(name: str, source: str, *words: str) -> Case:
    def act(folder: Path, _: Any) -> None:
        ChatTemplate(source, {}, folder / JINJA)

    return Case(f"template: {name}", act, (JINJA, "cannot be compiled", REMEDY_TEMPLATE, *words), CheckpointError)


def _rendered(name: str, source: str, *words: str, big: bool = False) -> Case:
    """A template that is run, with 16 million letters in `big`; what runs without end is stopped sooner."""

    def act(folder: Path, _: Any) -> None:
        template = ChatTemplate(_BIG * big + source, {}, folder / JINJA)
        with mock.patch.object(limits, "SECONDS", 0.3 if _TIME in words else limits.SECONDS):
            template.render([{"role": "user", "content": "a"}], None, add_generation_prompt=True)

    return Case(f"template: {name}", act, (JINJA, *words), InputError)


_BIG = "{% set big = 'a' * 16777216 %}"
_LOOP = "{% set ns = namespace(x=[1, 2], t='ab') %}{% for i in range(100) %}"
_LIST = "{% set r = range(99999) | list %}"
_END = "{% endfor %}{{ ns.x }}{{ ns.t }}"
_VALUE, _HELD, _TIME = "value of more than 32,000,000", "holds more than 256,000,000", "runs for more than"
_BITS, _FIELD, _DEEP = "number of more than 10,000 bits", "field of more than 999", "60 calls within each other"


def _load_processor(folder: Path, world: Any) -> None:
    """A checkpoint whose tokenizer has two control tokens exchanged, through the door that every model comes by."""
    for path in world.hf.glob("*.j*"):
        shutil.copyfile(path, folder / path.name)
    values = json.loads((folder / SAVED).read_text())
    _exchange("<|image_pad|>", "<|video_pad|>")(values)
    (folder / SAVED).write_text(json.dumps(values))
    Processor.from_dir(folder, OmniConfig.from_hf(json.loads((folder / "config.json").read_text())))


TOKENIZERS = [
    Case("tokenizer: another one than the model's", _load_processor,
         ("'<|image_pad|>'", "thinker_config.image_token_id", SAVED, "config.json"), CheckpointError),
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
    _saved("a merge of three", lambda v: v["model"]["merges"].append("a b c"), "not a pair"),
    _saved("a merge of a number", lambda v: v["model"]["merges"].append([1, 2]), "not a pair"),
    _saved("no merges", lambda v: v["model"].update(merges=[]), "no merge makes 197 of its tokens", "one and the same"),
    _saved("a merge too few", lambda v: v["model"]["merges"].__delitem__(-1), "no merge makes 1 of its tokens"),
    _saved("whole words instead of merges", lambda v: v["model"].update(ignore_merges=True), "'model'"),
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
    _saved("100,000 added tokens", lambda v: v.update(added_tokens=[{"content": f"<{i}>", "id": i} for i in _MANY]),
           "99,999 added tokens", "1,000"),
    _saved("a token of a million letters", lambda v: _rename(v["model"]["vocab"], "er", "a" * 10**6), "1,000,000"),
    _part("missing", TOKENS, lambda _: None, "no tokenizer", TOKENS, "copy it from the published checkpoint"),
    _part("missing", MERGES, lambda _: None, "no tokenizer", MERGES, "published"),
    _part("missing", SETTINGS, lambda _: None, "no tokenizer", SETTINGS, "published"),
    _part("without added tokens", SETTINGS, lambda _: "{}", "added_tokens.json", "added_tokens_decoder"),
    _part("added tokens in a list", SETTINGS, lambda _: '{"added_tokens_decoder": []}', "'added_tokens_decoder'"),
    _part("added tokens under names", SETTINGS, lambda _: '{"added_tokens_decoder": {"a": {}}}', "ids and tokens"),
    _part("added tokens from 5,000 digits on", SETTINGS,
          lambda _: '{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "a"}}}', "ids and tokens"),
    _part("a pointer", MERGES, lambda _: "version https://git-lfs.github.com/spec/v1\n", MERGES, "git lfs pull"),
    _part("not UTF-8", SETTINGS, lambda _: b'{"a": "\xe9"}', SETTINGS, "UTF-8"),
    _part("a page of HTML", TOKENS, lambda _: "<!doctype html>", TOKENS, "no valid JSON"),
    _part("a token twice", TOKENS, lambda text: '{"a": 1, "a": 2}', TOKENS, "'a' occurs twice"),
    _part("a token lost", TOKENS, lambda text: _vocabulary(text, lambda v: _rename(v, "er", "~~~")), "merge"),
    _part("ids with a hole", TOKENS, lambda text: _vocabulary(text, lambda v: v.update(A=9999)), "up to 9999", REMEDY),
    _part("cut within a line", MERGES, lambda text: text[: text.index(" ", 200)], MERGES, "not a pair"),
    _part("three on a line", MERGES, lambda text: text + "a b c\n", MERGES, "not a pair"),
    _part("a pickle", MERGES, lambda _: b"\x80\x04\x95\x00", MERGES, "UTF-8"),
    _part("another model's", MERGES, lambda text: text + "語 本\n", "merge", "same checkpoint"),
    Case("tokenizer: a negative id", lambda _, world: world.omni.processor.tokenizer.decode([-1]), ("negative",)),
    Case("tokenizer: half a surrogate pair", lambda _, world: world.omni.processor.tokenizer.encode("\ud83d"),
         ("surrogate", "errors='replace'"), InputError),
    Case("tokenizer: 11 million characters", lambda _, world: world.omni.processor.tokenizer.encode("a" * 11_000_000),
         ("11,000,000", "10,000,000", "shorten"), InputError),
]  # fmt: skip

TEMPLATES = [
    _found("a number", SETTINGS, {"chat_template": 5}, SETTINGS, "'chat_template'", "type int", REMEDY_TEMPLATE),
    _found("a list of numbers", SETTINGS, {"chat_template": [5]}, SETTINGS, "'default'", REMEDY_TEMPLATE),
    _found("no default among several", SETTINGS, {"chat_template": [{"name": "rag", "template": "a"}]}, "'default'"),
    _found("a default that is none", SETTINGS, {"chat_template": [{"name": "default"}]}, "'default'"),
    _found("a default that is a number", SETTINGS, {"chat_template": [{"name": "default", "template": 5}]}, "type int"),
    _found("by name", SETTINGS, {"chat_template": {"default": "a"}}, "type dict"),
    _found("true", "chat_template.json", {"chat_template": True}, "chat_template.json", "type bool"),
    _found("the template itself", "chat_template.json", b"{{ messages }}", "chat_template.json", "no valid JSON"),
    _found("a list", "chat_template.json", ["a"], "chat_template.json", "no JSON object"),
    _found("nothing", "chat_template.json", {}, "no chat template", JINJA, "copy one"),
    _found("100,000 brackets", "chat_template.json", b"[" * 100_000, "nested too deep"),
    _found("Latin-1", JINJA, "{{ 'é' }}".encode("latin-1"), JINJA, "UTF-8"),
    _found("a picture", JINJA, b"\x89PNG\r\n\x1a\n", JINJA, "UTF-8"),
    _found("half of UTF-16", JINJA, "{{ 1 }}".encode("utf-16")[:-1], JINJA, "UTF-16"),
    _found("70 MB", JINJA, b" " * 70_000_000, JINJA, "64,000,000"),
    _found("a tag that does not end", JINJA, b"{% if %}", JINJA, "cannot be compiled", REMEDY_TEMPLATE),
    _compiled("10 MB", "x" * 10_000_000, "10,000,000 characters", "100,000"),
    _compiled("100,000 brackets", "{{ " + "(" * 90_000 + " }}", "1,000 words and signs"),
    _compiled("loops 20,000 deep", "{% for a in b %}" * 5_000, "50 blocks"),
    _compiled("conditions 51 deep", "{% if a %}" * 51 + "{% endif %}" * 51, "50 blocks"),
    _compiled("blocks of text 51 deep", "{% set a %}" * 51 + "{% endset %}" * 51, "50 blocks"),
    _compiled("a list of 1,000", "{{ [" + "1," * 1000 + "] }}", "1,000 words and signs"),
    _compiled("a number of 5,000 digits", "{{ " + "9" * 5000 + " }}", "4300 digits"),
    _compiled("10,000 alternatives", "{% if a %}" + "{% elif a %}" * 8000 + "{% endif %}", "Memory"),
    _compiled("a filter that nobody needs", "{{ 'a' | urlize }}", "'urlize'"),
    _compiled("a filter that nobody has", "{{ 'a' | nonsense }}", "'nonsense'"),
    _rendered("9 ** 99999999", "{{ 9 ** 99999999 }}", _BITS, REMEDY_TEMPLATE),
    _rendered("a power of a power", "{{ ((9 ** 999) ** 999) ** 999 }}", _BITS),
    _rendered("a power that a compiler would compute", "{% if 9 ** 99999999 %}{% endif %}", _BITS),
    _rendered("a number squared a hundred times", "{% set ns = namespace(n=3) %}{% for i in range(99) %}"
              "{% set ns.n = ns.n * ns.n %}{% endfor %}", _BITS),
    _rendered("'a' * 10**10", "{{ 'a' * 10**10 }}", _HELD, "shorten"),
    _rendered("10**10 * 'a'", "{{ 10**10 * 'a' }}", _HELD),
    _rendered("a list multiplied", "{{ [0] * 10**10 }}", _HELD),
    _rendered("a tuple multiplied", "{{ (0, 1) * 10000000000 }}", _HELD),
    _rendered("10**12 passes", "{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    _rendered("two loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", _TIME),
    _rendered("two loops over a list", _LIST + "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", _TIME),
    _rendered("a filtered loop", _LIST + "{% for a in r %}{% for b in r if b < 0 %}{% endfor %}{% endfor %}", _TIME),
    _rendered("a loop that writes", "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 9999
              + "{% endfor %}{% endfor %}", _HELD),
    _rendered("a loop in a filter", "{{ range(99999) | select('in', range(99999) | list) | list }}", _TIME),
    _rendered("long comparisons", "{% set b = big ~ '' %}" + "{% if b == big %}{% endif %}" * 3000, _TIME, big=True),
    _rendered("a text doubled by ~", _LOOP + "{% set ns.t = ns.t ~ ns.t %}" + _END, _VALUE),
    _rendered("a text doubled by +", _LOOP + "{% set ns.t = ns.t + ns.t %}" + _END, _VALUE),
    _rendered("a text doubled by join", _LOOP + "{% set ns.t = [ns.t, ns.t] | join %}" + _END, _VALUE),
    _rendered("a text doubled by a method", _LOOP + "{% set ns.t = ns.t.join([ns.t] * 3) %}" + _END, _VALUE),
    _rendered("a text doubled by a block", _LOOP + "{% set y %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = y %}"
              + _END, _VALUE),
    _rendered("a text doubled by a macro", "{% macro m(t) %}{{ t }}{{ t }}{% endmacro %}" + _LOOP
              + "{% set ns.t = m(ns.t) %}" + _END, _VALUE),
    _rendered("a list doubled by +", _LOOP + "{% set ns.x = ns.x + ns.x %}" + _END, _VALUE),
    _rendered("a list that holds itself twice", _LOOP + "{% set ns.x = [ns.x, ns.x] %}" + _END, _VALUE),
    _rendered("a dict literal that holds itself twice", _LOOP + "{% set ns.x = {'a': ns.x, 1: ns.x} %}" + _END, _VALUE),
    _rendered("a dict that holds itself twice", _LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}" + _END, _VALUE),
    _rendered("hundreds of large texts", "".join(f"{{% set a{i} = big ~ {i} %}}" for i in range(99)), _HELD, big=True),
    _rendered("hundreds of large slices", "".join(f"{{% set a{i} = big[{i}:] %}}" for i in range(1, 99)), _HELD,
              big=True),
    _rendered("x | center(10**10)", "{{ 'x' | center(10**10) }}", _HELD),
    _rendered("center of a constant", "{{ 'x' | center(10000000000) }}", _HELD),
    _rendered("ljust", "{{ 'x'.ljust(10**10) }}", _HELD),
    _rendered("zfill", "{{ 'x'.zfill(10**10) }}", _HELD),
    _rendered("%10000000000d", "{{ '%10000000000d' % 1 }}", _FIELD),
    _rendered("%.10000000000f", "{{ '%.10000000000f' | format(1.5) }}", _FIELD),
    _rendered("%*d", "{{ '%*d' % (10**9, 1) }}", _FIELD),
    _rendered("{:10000000000}", "{{ '{:10000000000}'.format(1) }}", _FIELD),
    _rendered("{:{}}", "{{ '{:{}}'.format(1, 10**9) }}", "computes the width"),
    _rendered("a thousand long fields", "{{ ('{0}' * 1000).format(big) }}", _HELD, big=True),
    _rendered("indent", "{{ ('\n' * 1000000) | indent(1000000, blank=true) }}", _HELD),
    _rendered("replace nothing by much", "{{ big | replace('', big) }}", _HELD, big=True),
    _rendered("replace each by much", "{{ big.replace('a', big) }}", _HELD, big=True),
    _rendered("join with much", "{{ range(99999) | join(big) }}", _HELD, big=True),
    _rendered("join by much", "{{ big.join(['a'] * 9999) }}", _HELD, big=True),
    _rendered("JSON indented by much", "{{ [1] | tojson(indent=10**9) }}", _HELD),
    _rendered("JSON with long separators", "{{ ([0] * 99999) | tojson(separators=(big, ':')) }}", _HELD, big=True),
    _rendered("JSON 300 deep", _LOOP + "{% for j in range(3) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}"
              "{{ ns.x | tojson }}", "100 levels"),
    _rendered("round to 10**9 digits", "{{ 1.5 | round(10**9, 'ceil') }}", "999 digits"),
    _rendered("lists added up", "{{ [[1]] | sum(start=[]) }}", "not numbers"),
    _rendered("letters sorted", "{{ big | sort }}", _VALUE, big=True),
    _rendered("a search from the end", "{{ big.rfind('ab' ~ 'a' * 9999) }}", "1,000,000,000 comparisons", big=True),
    _rendered("many letters stripped", "{{ big.strip('b' * 99999 ~ 'a') }}", "1,000,000,000 comparisons", big=True),
    _rendered("a macro that calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", _DEEP),
    _rendered("a macro that calls itself twice",
              "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}", _TIME),
    _rendered("a block that holds itself", "{% block a %}{{ self.a() }}{% endblock %}", _DEEP),
    _rendered("a loop that calls itself", "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", _DEEP),
    _rendered("the time at great width", "{{ strftime_now('%Y' * 99999) }}", "overlong pattern"),
    _rendered("bytes", "{{ (5).to_bytes(10**10, 'big') }}", "int.to_bytes"),
    _rendered("a translation", "{{ big.translate({97: big}) }}", "str.translate", big=True),
    _rendered("a class", "{{ ''.__class__.__mro__ }}", "SecurityError"),
    _rendered("a change of the messages", "{{ messages.append(1) }}", "SecurityError"),
    _rendered("another file", "{% include 'a' %}", "no loader"),
    _rendered("an error of 32 million letters", "{{ raise_exception(big) }}", "cannot render", big=True),
]  # fmt: skip
CASES = [*TOKENIZERS, *TEMPLATES]
