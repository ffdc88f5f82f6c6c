"""The Talker's prompt against what transformers' generate hands to its Talker: ids, positions and embeddings."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.decode.prompt import pad_length
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.speech import OPENING, SpeechPrompt, speaker_id, speaker_ids, speech_prompt
from tests.parity import audio_part, image_part, reference_inputs, user, video_part

VARIANTS = ("tiny", "small", "odd")
SPEAKERS = {"tiny": ("ethan", "aiden"), "small": ("ethan", "vera"), "odd": ("una", "mo")}
SPOKEN = {"type": "video", "video": str(Path(__file__).parent.parent / "data" / "hello_with_speech.mp4"), "fps": 0.5}


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


CALL = {"function": {"name": "look_up", "arguments": {"word": "sky"}}}
PROMPTS: dict[str, tuple[list[dict], bool]] = {
    "text": (user("Why is the sky blue?"), False),
    "image": (user(image_part(90, 120), "What is this?"), False),
    "audio": (user("Listen:", audio_part(1.3)), False),
    "video": (user(video_part(4, 70, 90, 1.7), "What happens?"), False),
    "audio in video": (user(SPOKEN, "What is said?"), True),
    "audio in several videos": (
        user(SPOKEN, "and", audio_part(0.6, 1), image_part(60, 60), {**SPOKEN, "fps": 0.3}, "?"),
        True,
    ),
    "mixed": (
        user(
            image_part(60, 80, 1), audio_part(1.1, 3), video_part(3, 70, 60, 1.5), "between", audio_part(2.2, 4),
            image_part(100, 40, 2), video_part(2, 60, 60, 0.9, 5), "and the end",
        ),
        False,
    ),
    "system": (said("system", "Be brief.") + user(image_part(80, 60), "Hm?"), False),
    "turns": (
        said("system", "Be kind.")
        + user(video_part(3, 60, 80, 1.3), audio_part(0.7), "First.")
        + said("assistant", "The user saw a film.")
        + user(image_part(70, 110), "Second.")
        + said("assistant", "I see.")
        + user("Third."),
        False,
    ),
    "tools": (
        user("Look it up.")
        + [{"role": "assistant", "content": "At once.", "tool_calls": [CALL, CALL]}]
        + said("tool", "blue")
        + said("tool", "grey"),
        False,
    ),
}  # fmt: skip
ROWS = [
    PROMPTS["system"][0],
    user("Just a few words."),
    PROMPTS["turns"][0],
    user(audio_part(1.2, 5)),
    user(audio_part(3.4, 6), image_part(40, 130, 7), "Both, with rather more words than in the first row."),
]


@pytest.fixture(scope="module")
def processors(checkpoints: Callable[[str], Path]) -> Callable[[str], Processor]:
    @cache
    def load(variant: str) -> Processor:
        values = json.loads((checkpoints(variant) / "config.json").read_text())
        return Processor.from_dir(checkpoints(variant), OmniConfig.from_hf(values))

    return load


@dataclass
class Heard:
    """What the reference's Talker was given, [B, U], padded on the left, and the Thinker's reply and hidden states."""

    ids: np.ndarray
    embeds: np.ndarray
    positions: np.ndarray
    deltas: np.ndarray
    reply: np.ndarray
    hidden: Any


class _Reached(Exception):
    """Raised to stop the reference where its Talker would begin."""


def heard(model: Any, inputs: dict[str, Any], speaker: str, **talker: Any) -> Heard:
    """Run the reference up to the Talker's first step; `talker`: what it is told beyond what generate tells it."""
    import torch

    seen: dict[str, Any] = {}
    thinker_generate = model.thinker.generate

    def generate(**kwargs: Any) -> Any:
        seen["thinker"] = thinker_generate(**kwargs)
        return seen["thinker"]

    def stop(_: Any, __: Any, kwargs: dict) -> None:
        seen.update(kwargs)
        raise _Reached

    model.thinker.generate = generate
    hook = model.talker.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(_Reached):
            model.generate(
                **inputs, speaker=speaker, thinker_max_new_tokens=3, thinker_eos_token_id=-1,
                **{f"talker_{name}": value for name, value in talker.items()},
            )  # fmt: skip
    finally:
        hook.remove()
        del model.thinker.generate
    U = seen["talker_input_ids"].shape[1]
    layer = model.config.talker_config.accept_hidden_layer
    return Heard(
        ids=seen["talker_input_ids"].numpy(),
        embeds=seen["inputs_embeds"].numpy(),
        positions=seen["position_ids"].numpy()[1:],
        deltas=model.talker.rope_deltas.numpy()[:, 0] + U,
        reply=seen["thinker"].sequences[:, inputs["input_ids"].shape[1] :].numpy(),
        hidden=seen["thinker"].hidden_states[0][layer],
    )


def embeddings(model: Any, prompt: SpeechPrompt, hidden: Any) -> np.ndarray:
    """Float32 [B, U, D]: the columns of a prompt, made of the reference's weights and hidden states [B, T, D]."""
    import torch

    ids, index, codec = (torch.tensor(x).long() for x in (prompt.text_ids, prompt.hidden_index, prompt.codec_ids))
    with torch.no_grad():
        text = model.talker.text_projection(model.thinker.get_input_embeddings()(ids))
        found = hidden[torch.arange(len(index))[:, None], index.clamp_min(0)]
        x = torch.where(index[..., None] >= 0, model.talker.hidden_projection(found), text)
        added = model.talker.get_input_embeddings()(codec.clamp_min(0))
        return torch.where(codec[..., None] >= 0, x + added, x).numpy()


def assert_equal(got: SpeechPrompt, want: Heard, batch: Batch, model: Any, config: OmniConfig) -> None:
    """Every row of a prompt is what the reference's Talker was given; hidden states are those of a left-padded call."""
    made = embeddings(model, got, want.hidden)
    assert want.ids.shape == got.text_ids.shape
    for b, n in enumerate(got.length):
        row = batch.token_ids[b, got.hidden_index[b, :n]]
        ids = np.where(got.hidden_index[b, :n] >= 0, row, got.text_ids[b, :n])
        np.testing.assert_array_equal(ids[:-OPENING], want.ids[b, -n:-OPENING])
        assert ids[-1] == want.reply[b, 0] and set(want.ids[b, -OPENING:]) == {config.tts_pad_token_id}
        np.testing.assert_array_equal(got.position_ids[:, b, :n], want.positions[:, b, -n:])
        assert n + got.rope_delta[b] == want.deltas[b]
        assert np.abs(want.embeds[b, -n:]).mean() > 0.3, "a scale at which the tolerance means something"
        np.testing.assert_allclose(made[b, :n], want.embeds[b, -n:], atol=1e-5, rtol=0)


def compared(
    variant: str, conversations: list[list[dict]], hear: bool, speaker: str, processor: Processor, model: Any
) -> SpeechPrompt:
    """The prompt of a batch, after its comparison with the reference."""
    batch = processor.prepare(conversations, use_audio_in_video=hear, padding="left")
    inputs = reference_inputs(processor, conversations, batch, hear)
    want = heard(model, inputs, speaker, use_audio_in_video=hear)
    speakers = speaker_ids(speaker, len(conversations), processor.config)
    got = speech_prompt(batch, want.reply[:, 0].tolist(), speakers, processor.config)
    assert_equal(got, want, batch, model, processor.config)
    return got


def assert_same(got: SpeechPrompt, want: SpeechPrompt, row: int, shift: int) -> None:
    """The only row of `got` equals a row of `want`, whose hidden states lie `shift` columns behind."""
    n = want.length[row]
    assert got.length == [n] and got.rope_delta == [want.rope_delta[row]]
    for name in ("text_ids", "codec_ids", "position_ids"):
        np.testing.assert_array_equal(getattr(got, name)[..., 0, :], getattr(want, name)[..., row, :n])
    index = got.hidden_index[0]
    np.testing.assert_array_equal(np.where(index >= 0, index + shift, -1), want.hidden_index[row, :n])


@pytest.mark.parametrize(
    ("variant", "prompt"),
    # The reference takes half a minute for the eight large frames of "odd", which its one film shows as well.
    [(v, p) for v in VARIANTS for p in PROMPTS if (v, p) != ("odd", "audio in several videos")],
)
def test_prompts_equal_the_reference(
    variant: str, prompt: str, processors: Callable[[str], Processor], reference: Callable[[str], Any]
) -> None:
    conversation, hear = PROMPTS[prompt]
    got = compared(variant, [conversation], hear, SPEAKERS[variant][0], processors(variant), reference(variant))
    assert (got.hidden_index >= 0).any() == (prompt not in ("text", "tools"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unequal_rows_equal_the_reference(
    variant: str, processors: Callable[[str], Processor], reference: Callable[[str], Any]
) -> None:
    got = compared(variant, ROWS, False, SPEAKERS[variant][0], processors(variant), reference(variant))
    assert len(set(got.length.tolist())) == len(ROWS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_speaker_equals_the_reference(
    variant: str, processors: Callable[[str], Processor], reference: Callable[[str], Any]
) -> None:
    conversation, _ = PROMPTS["image"]
    one, other = (
        compared(variant, [conversation], False, name, processors(variant), reference(variant))
        for name in SPEAKERS[variant]
    )
    assert np.argwhere(one.codec_ids != other.codec_ids).tolist() == [[0, one.length[0] - 3]]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_equals_the_row_alone(variant: str, padding: str, processors: Callable[[str], Processor]) -> None:
    processor = processors(variant)
    batch = processor.prepare(ROWS, padding=padding)
    names = [SPEAKERS[variant][b % 2] for b in range(len(ROWS))]
    speakers, spoken = speaker_ids(names, len(ROWS), processor.config), [40 + b for b in range(len(ROWS))]
    together = speech_prompt(batch, spoken, speakers, processor.config)
    padded = speech_prompt(pad_length(batch, 2 * bucket(batch.token_ids.shape[1])), spoken, speakers, processor.config)
    for field in dataclasses.fields(SpeechPrompt):
        array = getattr(together, field.name)
        assert array.dtype == (np.float32 if field.name in ("position_ids", "rope_delta") else np.int32)
        np.testing.assert_array_equal(getattr(padded, field.name), array)
    U = together.text_ids.shape[1]
    assert together.length.max() == U and together.position_ids.shape == (3, len(ROWS), U)
    outside = np.arange(U) >= together.length[:, None]
    for array, fill in ((together.text_ids, 0), (together.hidden_index, -1), (together.codec_ids, -1)):
        assert (array[outside] == fill).all()
    for b, conversation in enumerate(ROWS):
        alone = speech_prompt(processor.prepare(conversation), spoken[b : b + 1], speakers[b : b + 1], processor.config)
        assert_same(alone, together, b, int(np.argmax(batch.mask[b])))


def test_the_opening_is_spelt_out(processors: Callable[[str], Processor]) -> None:
    processor = processors("small")
    config, tokenizer = processor.config, processor.tokenizer
    batch = processor.prepare(said("system", "Be brief.") + user("Hello"))
    got = speech_prompt(batch, [77], speaker_ids("VERA", 1, config), config)
    ids = got.text_ids[0].tolist()
    assert tokenizer.decode(ids[:-6], skip_special=False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[-6:] == [config.tts_pad_token_id] * 4 + [config.tts_bos_token_id, 77]
    assert got.codec_ids[0].tolist() == [-1] * (len(ids) - 6) + [140, 142, 144, 203, 130, 131]
    np.testing.assert_array_equal(got.position_ids[:, 0], np.tile(np.arange(len(ids)), (3, 1)))
    assert (got.hidden_index == -1).all() and got.rope_delta == [0] and got.length == [len(ids)]


def test_time_runs_at_the_rate_of_the_talker(
    processors: Callable[[str], Processor], reference: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, model = processors("small"), reference("small")
    assert processor.config.talker is not None
    conversation = user(video_part(7, 60, 60, 1.7), "When?")
    batch = processor.prepare(conversation)
    monkeypatch.setattr(model.talker.config, "position_id_per_seconds", 7)
    want = heard(model, reference_inputs(processor, [conversation], batch), "ethan")
    slow = dataclasses.replace(processor.config.talker, position_id_per_seconds=7.0)
    config = dataclasses.replace(processor.config, talker=slow)
    got = speech_prompt(batch, want.reply[:, 0].tolist(), speaker_ids("ethan", 1, config), config)
    assert_equal(got, want, batch, model, config)
    usual = speech_prompt(batch, [1], [200], processor.config)
    assert not np.array_equal(got.position_ids, usual.position_ids)


def test_sound_in_video_is_placed_as_the_thinker_places_it(
    processors: Callable[[str], Processor], reference: Callable[[str], Any]
) -> None:
    """The reference does not forward use_audio_in_video to its Talker; a user's tokens stand as in the Thinker."""
    processor, model = processors("tiny"), reference("tiny")
    conversation, _ = PROMPTS["audio in video"]
    batch = processor.prepare(conversation, use_audio_in_video=True)
    got = speech_prompt(batch, [1], [602], processor.config)
    users = got.length[0] - OPENING
    np.testing.assert_array_equal(got.position_ids[:, 0, :users], batch.position_ids[:, 0, :users])
    wrong = heard(model, reference_inputs(processor, [conversation], batch, True), "ethan").positions
    assert not np.array_equal(got.position_ids, wrong), "transformers has mended it: compare with it instead"


def test_media_of_dropped_turns_are_dropped(
    processors: Callable[[str], Processor], reference: Callable[[str], Any]
) -> None:
    """The reference counts pictures of a system turn among the user's; told of the user's alone, it agrees."""
    import torch

    processor, model = processors("tiny"), reference("tiny")
    conversation = [
        {"role": "system", "content": [image_part(60, 200, 1), {"type": "text", "text": "Like this."}]},
        *user(audio_part(0.8), image_part(130, 70, 2), "And this?"),
        {"role": "assistant", "content": [audio_part(1.9, 3), video_part(3, 60, 60)]},
        *user(audio_part(2.3, 4), video_part(5, 80, 60, 1.5, 4), "Or that?"),
    ]
    batch = processor.prepare(conversation)
    assert [item.kind for item in batch.items[0]] == ["image", "audio", "image", "audio", "video", "audio", "video"]
    inputs = reference_inputs(processor, [conversation], batch)
    kept = {
        "image_grid_thw": inputs["image_grid_thw"][1:],
        "video_grid_thw": inputs["video_grid_thw"][1:],
        "video_second_per_grid": inputs["video_second_per_grid"][1:],
        "audio_feature_lengths": inputs["feature_attention_mask"].sum(dim=1)[torch.tensor([0, 2])],
    }
    want = heard(model, inputs, "ethan", **kept)
    got = speech_prompt(batch, want.reply[:, 0].tolist(), [602], processor.config)
    assert_equal(got, want, batch, model, processor.config)


def test_a_written_think_block_is_not_spoken(processors: Callable[[str], Processor]) -> None:
    """The reference speaks whatever follows the header in the prompt."""
    processor = processors("odd")
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    plain, thinking, spoken = (
        speech_prompt(batch, [55], [301], processor.config)
        for batch in (
            processor.prepare_text(prompt),
            processor.prepare_text(prompt + "<think>\n\n</think>\n\n"),
            processor.prepare(user("Hello")),
        )
    )
    for field in dataclasses.fields(SpeechPrompt):
        np.testing.assert_array_equal(getattr(plain, field.name), getattr(thinking, field.name))
        np.testing.assert_array_equal(getattr(plain, field.name), getattr(spoken, field.name))


def test_without_a_turn_of_the_user_only_the_opening_is_read(processors: Callable[[str], Processor]) -> None:
    processor = processors("tiny")
    batch = processor.prepare([said("system", "Say something."), user("Hello")], padding="left")
    got = speech_prompt(batch, [5, 6], [602, 602], processor.config)
    assert got.length[0] == OPENING < got.length[1]
    np.testing.assert_array_equal(got.position_ids[:, 0, :OPENING], np.tile(np.arange(OPENING), (3, 1)))
    cut = processor.prepare_text("Noise<|im_start|>assistant\nOh<|im_start|>")
    assert speech_prompt(cut, [5], [602], processor.config).length == [OPENING]


def test_padding_and_earlier_headers_are_not_read(processors: Callable[[str], Processor]) -> None:
    """Raw prompts may end in a turn of the user, and what heads an earlier answer may differ."""
    processor = processors("small")
    prompts = [
        "<|im_start|>assistant Oh<|im_end|><|im_start|>assistant\nOh<|im_end|><|im_start|>user\nHi",
        "Long " * 30 + "<|im_start|>assistant\n",
    ]
    (alone,) = processor.prepare_text(prompts[0]).token_ids
    start = np.flatnonzero(alone == processor.config.im_start_token_id)
    for padding in ("left", "right"):
        batch = processor.prepare_text(prompts, padding=padding)
        got = speech_prompt(batch, [5, 6], [200, 200], processor.config)
        want = [*alone[start[2] :], *alone[start[1] : start[1] + 3]]
        assert got.text_ids[0, : got.length[0] - 6].tolist() == want
        assert got.text_ids[1, :3].tolist() == want[-3:] and got.length[1] == OPENING


def test_speakers_are_found_by_name(processors: Callable[[str], Processor]) -> None:
    config = processors("tiny").config
    assert config.talker is not None
    assert [speaker_id(name, config.talker) for name in ("ethan", "Ethan", "CHELSIE")] == [602, 602, 601]
    assert speaker_ids("Aiden", 3, config) == [603] * 3
    assert speaker_ids(("aiden", "ethan"), 2, config) == [603, 602]
    loud = dataclasses.replace(config.talker, speakers=(("ETHAN", 7),))
    assert speaker_id("ethan", loud) == 7


@pytest.mark.parametrize(
    ("speaker", "message"),
    [
        ("vera", "no speaker 'vera'; choose from aiden, chelsie, ethan"),
        ("", "no speaker ''"),
        (["ethan"], "1 speakers for 2 conversations"),
        (["ethan", "mo"], "no speaker 'mo'"),
        (["ethan", 602], "no speaker 602"),
        (602, "speaker is 602; give a name"),
        (None, "speaker is None"),
    ],
)
def test_unknown_speakers_are_named(speaker: Any, message: str, processors: Callable[[str], Processor]) -> None:
    with pytest.raises(InputError, match=message):
        speaker_ids(speaker, 2, processors("tiny").config)


def test_what_cannot_be_spoken_is_an_error(processors: Callable[[str], Processor]) -> None:
    processor = processors("tiny")

    def fails(batch: Batch, message: str, config: OmniConfig = processor.config) -> None:
        rows: Sequence[int] = [1] * len(batch.token_ids)
        with pytest.raises(InputError, match=message):
            speech_prompt(batch, rows, rows, config)

    asked = processor.prepare(user(image_part(60, 60)), add_generation_prompt=False)
    fails(asked, "^the prompt opens no turn of the assistant")
    fails(processor.prepare_text(["<|im_start|>assistant\n", "Hm?"]), "^row 1: the prompt opens no turn")
    fails(processor.prepare_text("<|im_start|>assistant"), "opens no turn")
    batch = processor.prepare(user(image_part(60, 60)))
    fails(dataclasses.replace(batch, items=()), "1 runs of placeholders for 0 items")
    silent = dataclasses.replace(processor.config, talker=None, code2wav=None)
    fails(batch, "cannot speak", silent)
    with pytest.raises(InputError, match="cannot speak"):
        speaker_ids("ethan", 1, silent)
