"""Tokenizer and TextStream: golden ids of the real vocabulary, `tokenizers` as the reference for decoding."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.tokenizer import Tokenizer

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
        (None, "does not exist"),
        ("version https://git-lfs.github.com/spec/v1\n", "no tokenizer file"),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "byte-level"),
    ],
)
def test_bad_tokenizer_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)
