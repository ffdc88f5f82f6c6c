"""The recipe of the Talker: what is trained, and that what was trained is spoken."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import omni_jax as oj
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.settings import Voice
from omni_jax.train.losses.talker import spoken_columns
from omni_jax.train.settings import Batching, Compute, Run
from omni_jax.train.talker import TalkerSft
from omni_jax.train.talker_batch import misread
from omni_jax.weights.trees import flatten
from tests.helpers.speech import SpeechExample, batch_of, random_codes
from tests.parity import user

REPLY = "Good day."


class Said:
    """A text that is complete."""

    done = True

    def __init__(self, ids: list[int]):
        self.spoken, self.key = ids, jax.random.key(0)


def recipe(source: Path, data: Path, **own: Any) -> TalkerSft:
    run = Run(model=source, data=(data,), output=data.parent / "run")
    return TalkerSft(run=run, batch=Batching(rows=2, workers=0), compute=Compute(dtype="float32"), **own)


def speak(omni: Omni, example: SpeechExample) -> np.ndarray:
    """The codes int32 [Q, F] that the model speaks for an example's text, without any chance."""
    voice = Voice(example.speaker, speech_temperature=0.0, speech_repetition_penalty=1.0, max_frames=20)
    request = SpeechRequest.read(omni.prepare([example.messages]), voice, omni.config)
    parts = omni.params["talker"], omni.declarations["talker"], lambda: omni.params["thinker"]["embed"], omni.config
    speakers = Speakers(*parts, voice, rows=1)
    speaker = speakers.insert(0, request, Said(omni.processor.tokenizer.encode_plain(example.reply)))
    while not speaker.done:
        speakers.advance()
    return speaker.codes


def test_what_is_learned_is_spoken(
    omnis: Callable[[str], Omni], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    omni, source = omnis("small"), checkpoints("small")
    example = SpeechExample(user("Hello"), REPLY, random_codes(omni, 7, 3), "vera", "d:1")
    said = [*example.messages, {"role": "assistant", "content": REPLY}]
    row = {"messages": said, "codes": example.codes.tolist(), "speaker": "vera"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    settings = recipe(source, tmp_path / "d.jsonl", no_media=True)
    objective, step_of_data = settings.objective(omni), next(iter(settings.batches(omni)))
    shown = settings.shown(omni, step_of_data)
    assert "d.jsonl:1\n<|im_start|>user\nHello<|im_end|>" in shown and "(0 of media, 7 frames: " in shown
    batch = step_of_data.batch
    assert set(objective.frozen["thinker"]) == {"embed"}
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params: Any, state: optax.OptState) -> Any:
        def mean(params: dict) -> jax.Array:
            loss = objective.loss(params, objective.frozen, batch)
            return loss.total / loss.weight

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = objective.params, optimizer.init(objective.params)
    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 5 and losses[-1] < 0.05
    objective.save(params, tmp_path / "model")
    trained = oj.load(tmp_path / "model")
    np.testing.assert_array_equal(speak(trained, example), example.codes)
    assert not np.array_equal(speak(omni, example)[:, :7], example.codes)
    before, after = flatten(omni.params), flatten(trained.params)
    assert before.keys() == after.keys()
    for path, value in after.items():
        same = np.array_equal(np.asarray(value), np.asarray(before[path]))
        assert same != (path.startswith("talker/") and "hidden_projection" not in path), path


def test_each_part_can_stay_as_it_is(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    every = set(flatten(omni.params["talker"]))
    trained = {}
    for part in ("talker", "projections", "predictor"):
        flags = {f"freeze_{name}": name != part for name in ("talker", "projections", "predictor")}
        objective = recipe(Path("m"), Path("d"), **flags, no_media=True).objective(omni)
        trained[part] = set(flatten(objective.params))
        assert trained[part] | set(flatten(objective.frozen["talker"])) == every
        assert set(flatten(objective.axes)) == trained[part]
    assert {path.split("/")[0] for path in trained["projections"]} == {"text_projection", "hidden_projection"}
    assert {path.split("/")[0] for path in trained["predictor"]} == {"code_predictor"}
    assert sum(map(len, trained.values())) == len(every) and {"embed", "codec_head"} < trained["talker"]
    everything: dict[str, Any] = {"freeze_talker": True, "freeze_projections": True, "freeze_predictor": True}
    for own, message in (
        (everything, "nothing is trained"),
        ({"predictor_weight": -1.0}, "--predictor-weight is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(Path("m"), Path("d"), **own).objective(omni)


def test_mistakes_are_read_and_never_learned(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    examples = [SpeechExample(user("Hello"), REPLY, random_codes(omni, 30 + i, i), "vera", f"d:{i}") for i in range(3)]
    plain = batch_of(omni, examples)
    codes = np.asarray(plain.codes)
    found = misread(codes, 0.6)
    np.testing.assert_array_equal(found, misread(codes, 0.6))
    real, wrong = codes >= 0, found != codes
    assert not wrong[~real].any() and {*found[:, 3][real[:, 3]]} <= {*codes[:, 3][real[:, 3]]}
    assert 0.5 < wrong[:, 1:][real[:, 1:]].mean() < 0.65 and 0.02 < wrong[:, 0][real[:, 0]].mean() < 0.2
    model = oj.bind(omni.declarations["talker"], omni.params["talker"])
    columns = [
        spoken_columns(model, batch, omni.params["thinker"]["embed"], None)
        for batch in (plain, dataclasses.replace(plain, read=found))
    ]
    np.testing.assert_array_equal(columns[0].embedded, columns[1].embedded)
    read = [np.asarray(one.x) for one in columns]
    np.testing.assert_array_equal(read[0][:, : columns[0].prompt], read[1][:, : columns[0].prompt])
    differ = np.abs(read[0] - read[1])[:, columns[0].prompt :].max(-1) > 1e-6
    np.testing.assert_array_equal(differ, wrong.any(1))


def test_a_share_of_mistakes_is_checked(omnis: Callable[[str], Omni], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mistakes is 1.0; it must be at least 0 and less than 1"):
        recipe(Path("m"), tmp_path / "d", mistakes=1.0, no_media=True).objective(omnis("small"))
