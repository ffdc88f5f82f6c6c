"""Rows with codes: what is read, and what is refused with its place and a remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.train.codes import Codebooks, load_encoder, read_codes
from omni_jax.train.codes_command import CheckCodes, check_codes
from omni_jax.train.codes_mimi import encode
from omni_jax.train.data.plan import Packing
from omni_jax.train.data.stream import open_stream
from omni_jax.train.talker_batch import SpeechBatch, speech_batch
from omni_jax.train.talker_data import NO_CODE
from tests.helpers.speech import SpeechExample, batch_of, random_codes, recipe_of
from tests.parity import picture, sound, user

BOOKS = Codebooks(5, 120)
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


def codes(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 120, (5, frames), np.int32)


def fixed(samples: np.ndarray, rate: int) -> Any:
    """An encoder whose codes say how much sound it was given, and at which rate."""
    assert samples.dtype == np.float32 and samples.ndim == 1
    return np.full((5, samples.size // 1000), rate // 1000)


def failing(samples: np.ndarray, rate: int) -> Any:
    raise RuntimeError("no weights")


HERE = __name__


def test_codes_are_read_in_every_form(tmp_path: Path) -> None:
    want = codes(7)
    for name, array in (("a", want), ("b", want.T), ("c", want.astype(np.int64)), ("d", want.astype(np.uint8))):
        np.save(tmp_path / f"{name}.npy", array)
        np.testing.assert_array_equal(read_codes(f"{name}.npy", tmp_path, BOOKS), want)
    np.testing.assert_array_equal(read_codes(want.tolist(), tmp_path, BOOKS), want)
    np.testing.assert_array_equal(read_codes(want.T.tolist(), tmp_path, BOOKS), want)
    square = codes(5)
    np.testing.assert_array_equal(Codebooks(5, 120, "QF").check(square), square)
    np.testing.assert_array_equal(Codebooks(5, 120, "FQ").check(square), square.T)


@pytest.mark.parametrize(
    "bad, message",
    [
        (codes(9)[:4], r"codes have shape \[4, 9\]; .* Q = 5 codebooks"),
        (codes(5), r"can be read in two ways; state --layout"),
        (codes(0), "hold no frame"),
        (np.zeros((5, 3)), "of type float64; give whole numbers"),
        (
            np.where(np.arange(6) == 4, 120, codes(6)),
            "codebook 0 of frame 4 holds 120, not one of the model's 0 to 119",
        ),
        (np.where(np.arange(6) == 2, -1, codes(6)), "codebook 0 of frame 2 holds -1"),
        (codes(6)[None], r"shape \[1, 5, 6\]"),
        ([[1, 2], [3]], "give every codebook as many frames"),
        ([], r"shape \[0\]"),
        ("no.npy", "no.npy does not exist"),
        ("codes.txt", "read from .npy files"),
        ("text.npy", "text.npy cannot be read"),
        (3, "of type int; give a list of lists"),
    ],
)
def test_wrong_codes_are_refused(bad: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    if isinstance(bad, np.ndarray):
        np.save(tmp_path / "bad.npy", bad)
        bad, message = "bad.npy", f"bad.npy: .*{message}"
    with pytest.raises(InputError, match=message):
        read_codes(bad, tmp_path, BOOKS)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


ROW = {"messages": MESSAGES, "codes": "a.npy"}
WRONG = [
    ({"messages": MESSAGES, "codes": [[121]] * 5}, "codebook 0 of frame 0 holds 121"),
    ({"messages": MESSAGES}, "neither codes nor speech"),
    ({"messages": MESSAGES[::-1], "codes": "a.npy"}, "none of the assistant"),
    ({**ROW, "messages": [MESSAGES[0], {**MESSAGES[1], "reasoning": "So?"}]}, "'reasoning', which is not spoken"),
    ({**ROW, "messages": [MESSAGES[0], {**MESSAGES[1], "content": ""}]}, "the last message is empty"),
    ({"messages": MESSAGES[1:], "codes": "a.npy"}, "message"),
    ({**ROW, "speaker": "nobody"}, "the model has no speaker 'nobody'"),
    ({**ROW, "speakr": "vera"}, "'speakr' is not read"),
    ({**ROW, "speech": "a.wav"}, "codes and speech"),
    ({"text": "Hm.", "codes": "a.npy"}, "write a conversation"),
    ({**ROW, "codes": "long.npy"}, "more than --max-length of 200"),
    ({**ROW, "codes": "b.npy"}, "b.npy does not exist"),
]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Rows of four samples, and rows that cannot be used."""
    np.save(tmp_path / "a.npy", codes(6))
    np.save(tmp_path / "long.npy", codes(200))
    soundfile.write(tmp_path / "a.wav", sound(0.5), 16_000)
    soundfile.write(tmp_path / "q.wav", sound(0.7), 16_000)
    PIL.Image.fromarray(picture(40, 60)).save(tmp_path / "p.png")
    asked = [{"role": "user", "content": "<image><audio>?"}, MESSAGES[1]]
    good = [
        ROW,
        {"messages": MESSAGES, "speech": "a.wav", "speaker": "VERA"},
        {"messages": asked, "images": ["p.png"], "audios": ["q.wav"], "codes": codes(9, 2).T.tolist()},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "codes": "a.npy"},
    ]
    return good + [row for row, _ in WRONG]


def test_rows_become_batches_and_problems_say_where(
    rows: list[dict], omnis: Callable[[str], Omni], tmp_path: Path
) -> None:
    omni, file = omnis("small"), write_rows(tmp_path / "d.jsonl", rows)
    recipe = recipe_of(omni, 200, encoder=fixed)
    stream = open_stream([file], recipe, speech_batch, Packing(3, 200, several=False), epochs=2, seed=1)
    assert [p.where for p in stream.problems] == [f"d.jsonl:{n}" for n in range(5, 5 + len(WRONG))]
    for problem, (_, why) in zip(stream.problems, WRONG, strict=True):
        assert why in problem.why, problem
    steps = list(stream)
    assert sorted(len(step.samples) for step in steps[:2]) == sorted(len(step.samples) for step in steps[2:]) == [1, 3]
    assert sorted(where for step in steps[:2] for where in step.samples) == [f"d.jsonl:{n}" for n in range(1, 5)]
    for step in steps:
        batch = step.batch
        assert isinstance(batch, SpeechBatch) and len(batch.codes) == 3
        learned = int((np.asarray(batch.codes)[:, 0] >= 0).sum())
        assert step.tokens == int(np.asarray(batch.prompt.length).sum()) + learned
    heard = next(step.batch for step in steps if "d.jsonl:3" in step.samples)
    assert heard.thinker is not None and len(heard.thinker.media.vision) == 1 and heard.thinker.media.audio is not None
    sounds = [step.batch for step in steps if "d.jsonl:2" in step.samples]
    assert all((np.asarray(batch.codes) == 16).any() for batch in sounds), "the encoder was given the file's own rate"
    for own, why in ((None, "name one with --encoder"), (failing, "encoder failed: no weights")):
        with pytest.raises(InputError, match=f"d.jsonl:2: .*{why}"):
            open_stream([file], recipe_of(omni, 200, encoder=own), speech_batch, Packing(3, 200), strict=True)


def test_a_sample_whose_media_are_gone_is_left_out(
    rows: list[dict], omnis: Callable[[str], Omni], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "d.jsonl", rows[2:3])
    stream = open_stream([file], recipe_of(omnis("small"), 200), speech_batch, Packing(2, 200, several=False))
    (tmp_path / "p.png").unlink()
    assert list(stream) == [] and [problem.where for problem in stream.problems] == ["d.jsonl:1"]


def test_encoders_are_named(tmp_path: Path) -> None:
    assert load_encoder(f"{HERE}:fixed") is fixed
    for name, message in (
        ("fixed", "give module:function"), ("nowhere.at_all:encode", "cannot be imported"),
        (f"{HERE}:BOOKS", "no function"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_encoder(name)


def test_batches_pad_rows(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    rows = [
        SpeechExample(user("Hello"), "Good day.", codes(5, 1), "vera"),
        SpeechExample(user("Hello again, with more words"), "Yes", codes(9, 2)),
    ]
    batch, config = batch_of(omni, rows, rows=4), omni.config
    prompt, held = batch.prompt, np.asarray(batch.codes)
    assert batch.thinker is None and held.shape == (4, 5, 12) and config.talker is not None
    assert (held[2:] == NO_CODE).all() and (np.asarray(prompt.length)[2:] == 0).all()
    U = prompt.text_ids.shape[1]
    for b, row in enumerate(rows):
        ids, n = omni.processor.tokenizer.encode_plain(row.reply), row.codes.shape[1]
        np.testing.assert_array_equal(held[b, :, :n], row.codes)
        assert (held[b, :, n:] == NO_CODE).all()
        assert prompt.text_ids[b, U - 1] == ids[0] and prompt.codec_ids[b, U - 1] == config.talker.codec_bos_id
        assert (prompt.codec_ids[b, : U - prompt.length[b]] == -1).all()
        text = [*ids[1:], config.tts_eos_token_id] + [config.tts_pad_token_id] * 12
        np.testing.assert_array_equal(batch.text_ids[b], text[:12])


def test_codes_can_be_heard(
    omnis: Callable[[str], Omni], checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, own, output = checkpoints("small"), random_codes(omnis("small"), 9, 0), tmp_path / "out.wav"
    np.save(tmp_path / "a.npy", own.T)
    soundfile.write(tmp_path / "a.wav", sound(0.5), 16_000)
    rows = write_rows(
        tmp_path / "d.jsonl", [{"messages": MESSAGES, "codes": "b.npy"}, {"messages": MESSAGES, "codes": "a.npy"}]
    )
    cases: list[dict[str, Any]] = [{"codes": tmp_path / "a.npy"}, {"codes": rows, "row": 2}]
    for flags in cases:
        check_codes(CheckCodes(model, output, **flags))
        heard, rate = soundfile.read(output)
        np.testing.assert_allclose(heard, omnis("small").vocode(own), atol=1e-4)
        assert rate == 24_000 and "9 frames of 5 codes" in capsys.readouterr().err
    check_codes(CheckCodes(model, output, speech=tmp_path / "a.wav", encoder=f"{HERE}:fixed"))
    np.testing.assert_allclose(soundfile.read(output)[0], omnis("small").vocode(np.full((5, 8), 16)), atol=1e-4)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"codes": rows, "row": 3}, "no row in line 3"),
        ({"codes": rows}, "d.jsonl:1: .*b.npy does not exist"),
        ({}, "either --codes or --speech"),
        ({"speech": tmp_path / "a.wav"}, "--speech needs an encoder"),
    ]
    for flags, message in wrong:
        with pytest.raises(InputError, match=message):
            check_codes(CheckCodes(model, output, **flags))


def test_mimi_encodes_sound(tmp_path: Path) -> None:
    """A small random codec of that kind: its first codebooks, from sound of any rate."""
    torch = pytest.importorskip("torch")
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = MimiConfig(
        hidden_size=32, num_filters=4, num_quantizers=20, num_semantic_quantizers=1, codebook_size=32, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, upsample_groups=32,
    )  # fmt: skip
    codec = MimiModel(config).eval()
    codec.save_pretrained(tmp_path / "mimi")
    samples = sound(0.9)
    with torch.no_grad():
        made: Any = codec.encode(torch.tensor(samples)[None, None], num_quantizers=16)
    want = made.audio_codes[0].numpy()
    got = encode(samples, 24_000, str(tmp_path / "mimi"))
    assert got.shape == want.shape and got.shape[0] == 16
    np.testing.assert_array_equal(got, want)
    slower = encode(samples, 16_000, str(tmp_path / "mimi"))
    assert slower.shape == (16, -(-got.shape[1] * 3 // 2))
    Codebooks(16, 32).check(got)
    with pytest.raises(InputError, match="no Mimi codec can be loaded"):
        encode(samples, 24_000, str(tmp_path / "nothing"))
