"""The stages voice and talker: a Talker for the trained codec, which speaks the Thinker's answers.

    speech/speech.jsonl, speech/<speaker>.npz -> aloud/aloud.jsonl
    speech/speech.jsonl, speech/<speaker>.npz, rows/*.train.jsonl -> spoken/<split>.jsonl
    mixed/model, codec.npz -> voiced
    voice/model, thinker/model -> joined
    voiced, aloud -> recipe talker -> voice/model
    joined, spoken -> recipe talker -> talker/model

Of the Thinker, the Talker is given embeddings and states, which change little after the stage mixed. So `voice` can run
while the Thinker is trained to its end, and `talker` goes on for a while with what has come of that.

The Talker is fed the answer one token per frame. To say its words in order is what takes longest to learn; `voice`
teaches that alone, by answers and many lists of words that are read aloud. It must speak an answer whatever the
conversation, too. In `talker` a sentence is therefore an answer in several conversations: its own ones, with their
pictures, sounds and videos; the words of one of them without these; one that asks to repeat it; and one that asks to
read it aloud. Its sentences are drawn sense by sense: of all answers together, hardly any names a noun.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import omni_jax
from omni_jax.decode.speech.aloud import READ_ALOUD
from omni_jax.files import write_whole
from omni_jax.settings import Voice
from omni_jax.train.loop import Trained
from omni_jax.train.saving import save_part
from omni_jax.train.settings import Batching, Compute, Optimizer, Run
from omni_jax.train.talker import TalkerSft
from omni_jax.weights.model import model_config
from scripts.nano.codec_stage import (
    CodecModules,
    code2wav_params,
    codes_digest,
    lines_of,
    read_codes,
    trained_codec,
)
from scripts.nano.listen import held_accuracy, listen, read_repeats
from scripts.nano.origin import check_origin, digest_of, model_of
from scripts.nano.rows import SPLITS, Split, assistant, pick, rows_digest, user
from scripts.nano.speech import LIST_SHARES, QUOTED_EVERY, VOICES, a_list, of_words, sayable
from scripts.nano.text import KEPT, REPEAT, wording
from scripts.nano.thinker import How, trained_by

Messages = list[dict[str, Any]]
# What was said before an answer, the answer, and who speaks it.
Spoken = tuple[Messages, str, str]

ROWS, LENGTH = 16, 512
# Of the stage voice: rows of a step, all rows, the share of them that are lists, and the longest text in frames.
ALOUD_ROWS, ALOUD, LISTED, ALOUD_FRAMES = 20, 60_000, 0.4, 95
# Of the stage talker: rows, the share of them that are lists, and how often each sense answers, in parts of all; the
# others answer as often as one.
SPOKEN, SPOKEN_LISTS = 60_000, 0.1
TALKED = {"scene": 5, "read": 4, "remember": 4, "digits": 3} | dict.fromkeys(("add", "compare", "count", "spell"), 2)
# Conversations of its own in which a sentence is answered.
OWN = 2
# The share of codes that the Talker reads as others, so that it goes on from its own mistakes.
MISTAKES = 0.4
# Held sentences that are spoken for the report.
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
    """Rows of conversations with spoken answers, written unless they are there: the file of each split.

    The test has what was held out, with each voice in several conversations. InputError if others are there.
    """
    files: dict[Split, Path] = {split: directory / "spoken" / f"{split}.jsonl" for split in SPLITS}
    origin = {"rows": rows_digest(directory), "codes": codes_digest(directory), "seed": seed}
    check_origin(directory, "spoken", [directory / "spoken"], {**origin, "number": SPOKEN, "shares": TALKED})
    if all(file.exists() for file in files.values()):
        return files
    held = list(lines_of(directory / "speech", "test"))
    texts = {line["text"] for line in held}
    answers = sayable(directory) | {"kept": [KEPT]}
    said = {sense: sorted({*each} - texts) for sense, each in answers.items()}
    own, codes = conversations(directory, texts.union(*said.values())), read_codes(directory)
    files["train"].parent.mkdir(exist_ok=True)
    drawn = (one for one in _drawn(np.random.default_rng(seed), said, own) if one[1] not in texts)
    spoken: dict[Split, Iterator[Spoken]] = {"train": drawn, "test": _tested(held, own, seed)}
    for split, file in files.items():
        write_whole(file, "".join(json.dumps(_row(*one, codes)) + "\n" for one in spoken[split]))
    return files


def _drawn(
    draw: np.random.Generator, said: Mapping[str, list[str]], own: Mapping[str, list[Messages]]
) -> Iterator[Spoken]:
    """What is spoken in training: answers of senses by their shares, in one conversation each, and lists."""
    senses = [sense for sense, answers in said.items() if answers]
    shares = np.array([TALKED.get(sense, 1) for sense in senses])
    for _ in range(SPOKEN):
        speaker = pick(draw, tuple(VOICES))
        if draw.random() < SPOKEN_LISTS:
            yield READ_ALOUD, a_list(draw), speaker
        else:
            text = pick(draw, said[draw.choice(senses, p=shares / shares.sum())])
            yield pick(draw, list(_before(draw, text, own[text], "train"))), text, speaker


def _tested(held: list[dict[str, str]], own: Mapping[str, list[Messages]], seed: int) -> Iterator[Spoken]:
    """What is spoken in the test: what was held out, in several conversations."""
    for line in held:
        text, speaker = line["text"], line["speaker"]
        draw = np.random.default_rng([seed, crc32(f"{speaker}: {text}".encode())])
        for before in _before(draw, text, own[text], "test"):
            yield before, text, speaker


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


def write_aloud(directory: Path, seed: int) -> Path:
    """Rows that read answers and lists aloud, none of which is held out, written unless they are there: their file.

    Of the answers each sense gives as many, so that those of which there are few come often. InputError if others are
    there.
    """
    file = directory / "aloud" / "aloud.jsonl"
    rows = rows_digest(directory)
    lists = [LISTED, *LIST_SHARES, QUOTED_EVERY]
    origin = {"rows": rows, "codes": codes_digest(directory), "number": ALOUD, "lists": lists, "seed": seed}
    check_origin(directory, "aloud", [file], origin)
    if file.exists():
        return file
    draw, codes = np.random.default_rng(seed), read_codes(directory)
    held = {line["text"] for line in lines_of(directory / "speech", "test")}
    each = [left for texts in sayable(directory).values() if (left := sorted({*texts} - held))]
    made: list[str] = []
    while len(made) < ALOUD:
        text = a_list(draw) if draw.random() < LISTED else pick(draw, pick(draw, each))
        row = _row(READ_ALOUD, text, pick(draw, tuple(VOICES)), codes)
        if text not in held and len(row["codes"][0]) <= ALOUD_FRAMES:
            made.append(json.dumps(row))
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(f"{line}\n" for line in made))
    return file


def _before(draw: np.random.Generator, text: str, own: list[Messages], split: Split) -> Iterator[Messages]:
    """The conversations in which a sentence is the answer; paths are relative to a folder beside that of the media."""
    said = text.rstrip(".")
    said = said if said.startswith("I ") else said[0].lower() + said[1:]
    yield [user(wording(draw, REPEAT, split).format(said))]
    yield READ_ALOUD
    if own:
        yield from (own[i] for i in draw.permutation(len(own))[:OWN])
        yield [without_media(message) for message in pick(draw, own)]


def _row(before: Messages, text: str, speaker: str, codes: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The row in which a speaker answers a conversation with a text; codes: of each speaker's words."""
    said = np.concatenate(of_words(text, codes[speaker]), axis=1)
    return {"messages": [*before, assistant(text)], "codes": said.tolist(), "speaker": speaker}


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
    """Train the Talker to say words in order, for the Thinker of the stage mixed, going on where it was.

    Of a frame's codes it learns the first alone.
    """
    model, data = write_voiced(directory), write_aloud(directory, how.seed)
    recipe = talker_recipe(model, data, directory / "voice", how._replace(left=0.2))
    batch = replace(recipe.batch, rows=ALOUD_ROWS, coarse=False)
    recipe = replace(recipe, batch=batch, no_media=True, freeze_predictor=True, predictor_weight=0.0)
    return _trained(directory, "voice", recipe)


def train_talker(directory: Path, how: How) -> Trained:
    """Train what the stage voice has made, with all codes, for the Thinker at its end, going on where it was."""
    model, data = write_joined(directory), write_spoken(directory, how.seed)["train"]
    return _trained(directory, "talker", talker_recipe(model, data, directory / "talker", how))


def _trained(directory: Path, stage: str, recipe: TalkerSft) -> Trained:
    model, (data,) = recipe.run.model, recipe.run.data
    origin = {model.name: model_of(model, stage), f"{data.parent.name}/{data.name}": digest_of([data])}
    check_origin(directory, stage, [directory / stage], origin)
    return trained_by(recipe)


def held_report(directory: Path, seed: int) -> str:
    """How well the trained Talker says sentences that were held out, in lines."""
    file, model = write_spoken(directory, seed)["test"], directory / "talker" / "model"
    recipe = talker_recipe(directory / "joined", file, directory / "talker", How(None, 1.0, seed, 0))
    metrics = held_accuracy(recipe, model)
    heard = listen(omni_jax.load(model), read_repeats(file, LISTENED), Voice(speech_temperature=0))
    made, true = np.array([one.frames for one in heard]).T
    near = np.mean([one.distance < one.other for one in heard])
    return (
        f"held sentences, true codes given: {metrics['talker_accuracy']:.1%} of first codes, "
        f"{metrics['predictor_accuracy']:.1%} of the others\n"
        f"spoken alone: {np.mean([one.ended for one in heard]):.0%} of {len(heard)} end, in {np.mean(made / true):.2f} "
        f"of the frames; {near:.0%} are nearer to their own sentence than to another; log-mels differ by "
        f"{np.median([one.distance for one in heard]):.2f} from their own and by "
        f"{np.median([one.other for one in heard]):.2f} from another's"
    )
