"""A Thinker alone, as the public Thinking and Captioner checkpoints are: converted, asked, and converted back."""

import json
from pathlib import Path

import numpy as np
import pytest

import convert
import omni_jax as oj
from omni_jax.cli import main
from omni_jax.config import OmniConfig
from omni_jax.decode.reasoning import CLOSE
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from scripts.small.checkpoint import make_checkpoint
from scripts.small.configs import config_dict
from tests.convert.conftest import read_tensors

QUESTION = [{"role": "user", "content": "What is two and two?"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("thinking") / "source", "thinking", dtype="bfloat16")


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("thinking") / "converted"
    convert.convert_checkpoint(source, destination, progress=False)
    return destination


@pytest.fixture(scope="module")
def omni(model: Path) -> Omni:
    return oj.load(model)


def test_it_has_no_part_that_speaks(omni: Omni, source: Path) -> None:
    stated = json.loads((source / "config.json").read_text())
    assert not {"talker_config", "code2wav_config"} & stated.keys() and not stated["enable_audio_output"]
    assert set(omni.params) == {"thinker"} and omni.config.talker is None
    assert all(name.startswith("thinker.") for name in read_tensors(source))
    assert omni.config.thinker == OmniConfig.from_hf(config_dict("tiny")).thinker


def test_converted_back_every_tensor_is_the_same(source: Path, model: Path, tmp_path: Path) -> None:
    convert.reverse_checkpoint(model, tmp_path / "back")
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_reply_cut_short_while_it_thinks_is_all_reasoning(omni: Omni) -> None:
    reply = omni.generate(QUESTION, max_new_tokens=8)
    written = omni.processor.tokenizer.decode(reply.token_ids)
    assert CLOSE not in written
    assert (reply.text, reply.reasoning) == ("", written.strip("\n"))
    events = list(omni.stream(QUESTION, max_new_tokens=8))
    assert not any(event.text for event in events)
    assert "".join(event.reasoning for event in events) == reply.reasoning


@pytest.mark.parametrize(
    "thinking, end", [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n"), (None, "<think>\n")]
)
def test_the_template_is_told_whether_to_think(omni: Omni, thinking: bool | None, end: str) -> None:
    (ids,) = omni.prepare(QUESTION, thinking=thinking).token_ids
    prompt = omni.processor.tokenizer.decode(ids, skip_special=False)
    assert prompt.endswith(f"<|im_start|>assistant\n{end}")


def test_without_thinking_a_reply_is_all_answer(omni: Omni) -> None:
    reply = omni.generate(QUESTION, thinking=False, max_new_tokens=8)
    assert (reply.text, reply.reasoning) == (omni.processor.tokenizer.decode(reply.token_ids), None)


def test_a_turn_of_sound_alone_is_answered(omni: Omni, data_dir: Path) -> None:
    sound = str(data_dir / "alsa_Front_Center.flac")
    turn = [{"role": "user", "content": [{"type": "audio", "audio": sound}]}]
    batch = omni.prepare(turn)
    assert batch.audio is not None and (batch.token_ids == omni.config.thinker.audio_token_id).sum() > 10
    assert len(omni.generate(turn, max_new_tokens=4).token_ids) == 4


def test_the_command_line_thinks_apart_and_hears_sound_alone(
    model: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", str(model), "--audio", str(data_dir / "alsa_Front_Center.flac"), "--max-new-tokens", "4"]
    main(["generate", *asked, "--json"])
    reply = json.loads(capsys.readouterr().out)
    assert reply["text"] == "" and reply["reasoning"] and reply["stats"]["new_tokens"] == 4
    main(["stream", *asked])
    out, err = capsys.readouterr()
    assert out == "\n" and reply["reasoning"] in err
    main(["generate", *asked, "--thinking", "False", "--json"])
    assert "reasoning" not in json.loads(capsys.readouterr().out)


def test_asked_to_speak_it_says_that_it_cannot(
    omni: Omni, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="cannot speak, it has no talker and code2wav .*; ask for text only"):
        omni.generate(QUESTION, speech=True)
    with pytest.raises(InputError, match="this model has no talker .*use the Thinker alone"):
        _ = omni.talker
    with pytest.raises(SystemExit) as end:
        main(["generate", "--model", str(model), "--text", "Hi", "--speak", str(tmp_path / "hi.wav")])
    assert end.value.code == 3 and not (tmp_path / "hi.wav").exists()
    assert "cannot speak" in capsys.readouterr().err


def test_transformers_loads_it_too(source: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3OmniMoeForConditionalGeneration

    theirs, report = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert not theirs.has_talker
