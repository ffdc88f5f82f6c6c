"""Tokenizer and TextStream: golden ids of the real vocabulary, `tokenizers` as the reference for decoding."""

import gzip
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.tokenizer import Tokenizer
from scripts.small.configs import config_dict
from scripts.small.tokenizer import publish

DATA = Path(__file__).parent.parent / "data"
GOLDEN = json.loads((DATA / "golden_ids.json").read_text())
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_bytes(gzip.decompress((DATA / "tokenizer.json.gz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def library(directory):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def published(directory, tmp_path_factory):
    """The same tokenizer in the form of the public checkpoint: vocab.json, merges.txt and its tokenizer_config.json."""
    path = tmp_path_factory.mktemp("published")
    shutil.copy(directory / "tokenizer.json", path)
    shutil.copy(DATA / "public_tokenizer_config.json", path / "tokenizer_config.json")
    shutil.copy(DATA / "public_config.json", path / "config.json")
    publish(path)
    return path


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: repr(c["text"][:20]))
def test_golden_ids(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    if not any(literal in case["text"] for literal in tokenizer.added):
        assert tokenizer.encode_plain(case["text"]) == case["ids"]


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_encoding_ordinary_text_is_the_same_with_and_without_specials(tokenizer, text):
    if not any(literal in text for literal in tokenizer.added):
        assert tokenizer.encode_plain(text) == tokenizer.encode(text)


@pytest.mark.parametrize("literal", ["<|im_end|>", "<|audio_pad|>", "<tts_pad>", "<think>", "</tool_response>"])
def test_plain_literals_are_spelled_out(tokenizer, literal):
    ids = tokenizer.encode_plain(f"a {literal} b")
    assert tokenizer.token_id(literal) not in ids
    assert max(ids) < 151_643
    assert tokenizer.decode(ids) == f"a {literal} b"
    assert tokenizer.encode(literal) == [tokenizer.token_id(literal)]


def test_special_and_visible_tokens(tokenizer):
    ids = tokenizer.encode("<|im_start|><think>x</think><|im_end|>")
    assert tokenizer.decode(ids) == "<think>x</think>"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|><think>x</think><|im_end|>"
    assert "<think>" in tokenizer.added and "<think>" not in tokenizer.special
    assert len(tokenizer.added) == 33 and len(tokenizer.special) == 21


def test_every_token_decodes_as_the_library_does(tokenizer, library):
    for i in range(0, tokenizer.size, 7):
        assert tokenizer.decode([i], skip_special=False) == library.decode([i], skip_special_tokens=False), i


random_ids = st.lists(st.one_of(st.integers(0, 255), st.integers(0, 152_063)), max_size=60)


@quick
@given(random_ids, st.booleans())
def test_decode_matches_the_library(tokenizer, library, ids, skip):
    """The first 256 ids are single bytes, so that broken UTF-8 of every kind occurs; spare rows decode to nothing."""
    assert tokenizer.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


@quick
@given(random_ids, st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_a_stream_gives_what_decode_gives(tokenizer, ids, sizes):
    stream, pieces, at = tokenizer.stream(), [], 0
    for size in sizes:
        pieces.append(stream.add(ids[at : at + size]))
        at += size
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_stream_of_text_never_shows_a_broken_character(tokenizer, text):
    import unicodedata

    ids = tokenizer.encode_plain(text)
    stream = tokenizer.stream()
    pieces = [stream.add([i]) for i in ids]
    assert stream.finish() == ""
    normal = unicodedata.normalize("NFC", text)
    assert "".join(pieces) == normal
    assert sum(p.count("\ufffd") for p in pieces) == normal.count("\ufffd")


def test_a_stream_waits_for_the_rest_of_a_character(tokenizer):
    ids = tokenizer.encode("👩‍👧")
    stream = tokenizer.stream()
    assert "\ufffd" not in "".join(stream.add([i]) for i in ids)
    half = tokenizer.encode("語" * 3)[:1]
    first_byte = [b for b in range(256) if tokenizer.token_bytes(b) == b"\xe8"]
    assert stream.add(half + first_byte) == tokenizer.decode(half)
    assert stream.finish() == "\ufffd"
    assert stream.add(tokenizer.encode("ok")) + stream.finish() == "ok"


def test_a_stream_is_linear(tokenizer):
    """Decoding everything again at each token would make the second half of a long reply slower than the first."""
    calls = []
    original = tokenizer.token_bytes
    tokenizer.token_bytes = lambda *a: calls.append(a) or original(*a)
    try:
        stream = tokenizer.stream()
        for i in tokenizer.encode("word " * 500):
            stream.add([i])
    finally:
        del tokenizer.token_bytes
    assert len(calls) <= 501


def test_text_that_is_no_unicode_is_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(InputError, match="surrogate"):
            encode("bad \ud83d end")


def test_negative_ids_are_refused(tokenizer):
    with pytest.raises(InputError, match="negative"):
        tokenizer.decode([9707, -1])


def test_spare_rows_are_legal_and_missing_rows_are_not(tokenizer):
    assert tokenizer.size == 151_676
    tokenizer.check_rows(152_064)
    tokenizer.check_rows(151_676)
    with pytest.raises(CheckpointError, match="151675.*151675 rows"):
        tokenizer.check_rows(151_675)


def test_unknown_token_name(tokenizer):
    with pytest.raises(CheckpointError, match="<.nonsense.>"):
        tokenizer.token_id("<|nonsense|>")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no tokenizer: neither tokenizer.json nor"),
        ("version https://git-lfs.github.com/spec/v1\n", "tokenizer.json: a Git LFS pointer"),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "byte-level"),
    ],
)
def test_bad_tokenizer_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)


# The form in which the model is published

SCRIPTS = [
    (0x41, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x591, 0x5F4), (0x600, 0x6FF), (0x900, 0x97F), (0xB82, 0xBFA),
    (0xE01, 0xE5B), (0x10A0, 0x10FF), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF),
]  # fmt: skip
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\n\n ", "   \n", "\u00a0", "\u3000", "\u2028", " " * 17]
ODD = ["don't", "I'LL", "...", "!?", "<|", "|>", "\x00", "\x7f", "\ufeff", "\u200d", "\ue000", "👩‍👧‍👦", "e\u0301"]


def strings(added, count):
    """Mixed strings in 14 scripts, with whitespace, digits, combining marks, emoji and whole or cut control tokens."""
    draw = random.Random(5)
    makers = [
        lambda low, high: "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 12))),
        lambda *_: draw.choice(SPACES),
        lambda *_: str(draw.randint(0, 10 ** draw.randint(1, 12))),
        lambda *_: "".join(chr(draw.randint(0x300, 0x36F)) for _ in range(draw.randint(1, 6))),
        lambda *_: draw.choice(ODD),
        lambda *_: draw.choice(added),
        lambda *_: draw.choice(added)[: draw.randint(1, 8)],
    ]
    for i in range(count):
        pieces = draw.choices(makers, [5, 2, 1, 1, 1, 1, 1], k=draw.randint(1, 10))
        yield "".join(make(*SCRIPTS[i % len(SCRIPTS)]) for make in pieces)


def added_of(backend):
    return {
        i: (t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized)
        for i, t in backend.get_added_tokens_decoder().items()
    }


def same_as_transformers(path, count):
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)
    ours = Tokenizer(path)
    assert added_of(ours._backend) == added_of(reference._tokenizer)
    for text in strings(ours.added, count):
        ids = ours.encode(text)
        assert ids == reference(text).input_ids, text
        assert ours.decode(ids, skip_special=False) == reference.decode(ids), text
    return ours


def test_the_published_form_gives_the_ids_of_transformers(published, tokenizer):
    ours = same_as_transformers(published, 2000)
    assert (ours.size, ours.special, ours.added) == (tokenizer.size, tokenizer.special, tokenizer.added)


def test_an_older_export_with_added_tokens_json(published, tmp_path):
    """Which tokens are special stands in special_tokens_map.json there; the others are normalised before the search."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = settings.pop("added_tokens_decoder")
    settings["pad_token"] = "<|endoftext|>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({t["content"]: int(i) for i, t in added.items()}))
    extra = ["<|im_start|>", "<tts_pad>"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": extra}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = same_as_transformers(tmp_path, 200)
    assert "<|im_end|>" in ours.special and "<think>" not in ours.special


def test_flags_of_added_tokens_are_those_of_transformers(published, tmp_path):
    """Flags that are missing have the library's defaults, and a token with a role is special whatever its flags say."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    added["151645"] |= {"special": False, "lstrip": True}  # <|im_end|>, which ends a text
    added["151657"] = {"content": "<tool_call>"}
    added["151667"] |= {"lstrip": True, "rstrip": True}
    added["151659"] |= {"single_word": True, "normalized": True}
    settings["mask_token"] = "<mask>"  # a role whose token is in no list
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = same_as_transformers(tmp_path, 300)
    assert ours.encode("a <think> b") != Tokenizer(published).encode("a <think> b")
    assert ours.token_id("<mask>") == 151_676


def test_tokenizer_json_goes_before_the_parts(published, directory, tmp_path):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    shutil.copy(directory / "tokenizer.json", tmp_path)
    (tmp_path / "merges.txt").write_text("no merges")
    assert Tokenizer(tmp_path).encode("hello world") == Tokenizer(directory).encode("hello world")


def test_a_published_files_marks_and_line_ends_do_not_matter(published, tokenizer, tmp_path):
    """Editors of other systems add byte-order marks, write UTF-16, or end lines with a carriage return."""
    for name in ("vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((published / name).read_text("utf-8"), "utf-8-sig")
    merges = (published / "merges.txt").read_text("utf-8").replace("\n", "\r\n")
    (tmp_path / "merges.txt").write_bytes(merges.encode("utf-16"))
    text = "Größe  見て\n\n<|im_end|>"
    assert Tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("variant", ["tiny", "small", "odd", "full"])
def test_ids_of_the_configuration_fit(checkpoints, published, variant):
    path = published if variant == "full" else checkpoints(variant)
    Tokenizer(path).check_ids(OmniConfig.from_hf(config_dict(variant)))


@pytest.mark.parametrize("name", [
    "im_start", "im_end", "system", "user", "assistant", "tts_pad", "tts_bos", "tts_eos", "thinker_config.image",
    "thinker_config.video", "thinker_config.audio", "thinker_config.vision_start", "thinker_config.audio_start",
])  # fmt: skip
def test_every_id_of_the_configuration_is_compared(tokenizer, name):
    """Another id than the tokenizer's is named with both files."""
    config = OmniConfig.from_hf(config_dict("full"))
    section, _, key = name.rpartition(".")
    changed = {f"{key}_token_id": 77}
    config = replace(config, thinker=replace(config.thinker, **changed)) if section else replace(config, **changed)
    with pytest.raises(
        CheckpointError, match=rf"tokenizer.json: .* has the id \d+, but {name}_token_id is 77 in .*config.json"
    ):
        tokenizer.check_ids(config)


@pytest.mark.parametrize(
    "text", ["a" * 300_000, " " * 300_000 + "x", "\n " * 150_000, "e" + "\u0301" * 300_000, "!?" * 150_000]
)
def test_a_long_word_costs_no_more_than_words(tokenizer, text):
    """Time grows with the length alone, whatever the characters: a merge of n letters is no n * n comparisons."""
    start = time.perf_counter()
    tokenizer.encode(text)
    tokenizer.encode_plain(text)
    assert time.perf_counter() - start < 10


def test_a_text_beyond_the_limit_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("omni_jax.inputs.tokenizer.MAX_CHARACTERS", 10)
    assert tokenizer.encode("a" * 10)
    with pytest.raises(InputError, match="11 characters; at most 10"):
        tokenizer.encode("a" * 11)
