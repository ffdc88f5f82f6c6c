"""The stages voice and talker: a Talker for the trained codec, which speaks the Thinker's answers.

    speech/speech.jsonl, rows/*.train.jsonl -> spoken/<split>.jsonl
    mixed/model, codec.npz -> voiced -> recipe talker -> voice/model
    voice/model, thinker/model -> joined -> recipe talker -> talker/model

Of the Thinker, the Talker is given embeddings and states, which change little after the stage mixed. So `voice` can run
while the Thinker is trained to its end, and `talker` goes on for a while with what has come of that.

The Talker is fed the answer one token per frame and must speak it whatever the conversation. Each sentence is therefore
an answer in several conversations: its own ones, with their pictures, sounds and videos; the words of one of them
without these; and one that asks to repeat it.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import omni_jax
from omni_jax.files import write_whole
from omni_jax.settings import Voice
from omni_jax.train.loop import Trained
from omni_jax.train.saving import save_part
from omni_jax.train.settings import Batching, Compute, Optimizer, Run
from omni_jax.train.talker import TalkerSft
from omni_jax.weights.model import model_config
from scripts.nano.codec_stage import CodecModules, code2wav_params, codes_digest, lines_of, trained_codec
from scripts.nano.listen import held_accuracy, listen, read_repeats
from scripts.nano.origin import check_origin, digest_of, model_of, rows_digest
from scripts.nano.rows import SPLITS, Split, assistant, made_senses, pick, user
from scripts.nano.text import REPEAT, wording
from scripts.nano.thinker import How, trained_by

Messages = list[dict[str, Any]]

ROWS, LENGTH = 16, 512
# Conversations of its own in which a sentence is trained, with each voice.
OWN = 2
# The share of codes that the Talker reads as others: most of those that it says are not the ones of a clip.
MISTAKES = 0.4
# Held clips that are spoken for the report.
LISTENED = 32


def write_voiced(directory: Path) -> Path:
    """The model of the stage mixed with the Code2Wav of the codec, written unless it is there.

    InputError if one of other parts is there.
    """
    voiced, model = directory / "voiced", directory / "mixed" / "model"
    parts = {"mixed/model": model_of(model, "mixed"), "codec.npz": digest_of([directory / "codec.npz"])}
    check_origin(directory, "voiced", [voiced], parts)
    if not voiced.exists():
        config = model_config(model).code2wav
        assert config is not None
        state = trained_codec(CodecModules.of(config), directory)
        save_part("code2wav", model, None, code2wav_params(state), voiced)
    return voiced


def write_joined(directory: Path) -> Path:
    """The model of the stage voice with the Thinker of the stage thinker, written unless it is there.

    InputError if one of other parts is there.
    """
    joined, voice, model = directory / "joined", directory / "voice" / "model", directory / "thinker" / "model"
    parts = {"voice/model": model_of(voice, "voice"), "thinker/model": model_of(model, "thinker")}
    check_origin(directory, "joined", [joined], parts)
    if not joined.exists():
        save_part("thinker", voice, None, omni_jax.load(model, parts=("thinker",)).params["thinker"], joined)
    return joined


def write_spoken(directory: Path, seed: int) -> dict[Split, Path]:
    """Rows of conversations for all that was spoken, written unless they are there: the file of each split.

    InputError if others are there.
    """
    files: dict[Split, Path] = {split: directory / "spoken" / f"{split}.jsonl" for split in SPLITS}
    said = digest_of([directory / "speech" / "speech.jsonl"])
    origin = {"rows": rows_digest(directory, made_senses(directory, "train")), "speech/speech.jsonl": said}
    check_origin(directory, "spoken", [directory / "spoken"], {**origin, "seed": seed})
    if all(file.exists() for file in files.values()):
        return files
    lines = {split: list(lines_of(directory / "speech", split)) for split in SPLITS}
    own = conversations(directory, {line["text"] for split in SPLITS for line in lines[split]})
    for split, file in files.items():
        file.parent.mkdir(exist_ok=True)
        rows = (row for line in lines[split] for row in _rows(line, own[line["text"]], split, seed))
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return files


def conversations(directory: Path, texts: set[str]) -> defaultdict[str, list[Messages]]:
    """What was said before each of `texts` in the training rows."""
    found: defaultdict[str, list[Messages]] = defaultdict(list)
    for file in sorted(directory.glob("rows/*.train.jsonl")):
        for line in file.read_text().splitlines():
            messages = json.loads(line)["messages"]
            for i, message in enumerate(messages):
                if message["role"] == "assistant" and message["content"] in texts:
                    found[message["content"]].append(messages[:i])
    return found


def _rows(line: dict[str, str], own: list[Messages], split: Split, seed: int) -> Iterator[dict[str, Any]]:
    """The rows in which one clip is the answer; their paths are relative to a folder beside that of the media."""
    text, draw = line["text"], np.random.default_rng([seed, crc32(f"{line['speaker']}: {line['text']}".encode())])
    said = text.rstrip(".")
    said = said if said.startswith("I ") else said[0].lower() + said[1:]
    before = [[user(wording(draw, REPEAT, split).format(said))]]
    if own:
        before += [own[i] for i in draw.permutation(len(own))[:OWN]]
        before.append([without_media(message) for message in pick(draw, own)])
    codes = f"../speech/{line['codes']}"
    for messages in before:
        yield {"messages": [*messages, assistant(text)], "codes": codes, "speaker": line["speaker"]}


def without_media(message: dict[str, Any]) -> dict[str, Any]:
    """A message with nothing but its text."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [part for part in content if part["type"] == "text"]}


def talker_recipe(model: Path, data: Path, output: Path, how: How) -> TalkerSft:
    """How the Talker of a model is trained on a file of rows."""
    return TalkerSft(
        run=Run(model=model, data=(data,), output=output, steps=how.steps, seed=how.seed, save_every=200),
        optimizer=Optimizer(
            optimizer="muon", learning_rate=how.rate, warmup_ratio=0.03, final_ratio=how.left, weight_decay=0.02
        ),
        batch=Batching(rows=ROWS, max_length=LENGTH, workers=how.workers, coarse=True),
        compute=Compute(remat="none"),
        layout="QF",
        mistakes=MISTAKES,
    )


def train_voice(directory: Path, how: How) -> Trained:
    """Train Talker, projections and code predictor for the Thinker of the stage mixed, going on where it was."""
    return _trained(directory, "voice", write_voiced(directory), how._replace(left=0.2))


def train_talker(directory: Path, how: How) -> Trained:
    """Train what the stage voice has made for the Thinker at its end, going on where it was."""
    return _trained(directory, "talker", write_joined(directory), how)


def _trained(directory: Path, stage: str, model: Path, how: How) -> Trained:
    codes, data = codes_digest(directory), write_spoken(directory, how.seed)["train"]
    origin = {model.name: model_of(model, stage), "spoken/train.jsonl": digest_of([data]), "codes": codes}
    check_origin(directory, stage, [directory / stage], origin)
    return trained_by(talker_recipe(model, data, directory / stage, how))


def held_report(directory: Path, seed: int) -> str:
    """How well the trained Talker says sentences that were held out, in lines."""
    file, model = write_spoken(directory, seed)["test"], directory / "talker" / "model"
    recipe = talker_recipe(directory / "joined", file, directory / "talker", How(None, 1.0, seed, 0))
    metrics = held_accuracy(recipe, model)
    heard = listen(omni_jax.load(model), read_repeats(file, LISTENED), file.parent, Voice(speech_temperature=0))
    made, true = np.array([one.frames for one in heard]).T
    near = np.mean([one.distance < one.other for one in heard])
    return (
        f"held sentences, true codes given: {metrics['talker_accuracy']:.1%} of first codes, "
        f"{metrics['predictor_accuracy']:.1%} of the others\n"
        f"spoken alone: {np.mean([one.ended for one in heard]):.0%} of {len(heard)} end, in {np.mean(made / true):.2f} "
        f"of the frames; {near:.0%} are nearer to their own clip than to another, log-mels differ by "
        f"{np.median([one.distance for one in heard]):.2f} and {np.median([one.other for one in heard]):.2f}"
    )
