"""The model's answers spoken by both speakers, and how much of them a recogniser understands.

    test prompts -> generate(speech=True) -> waves -> recogniser -> transcripts, which are kept -> counts

Counted are all answers, those that the Talker was not trained on, and for comparison three others: the same sentences
spoken by the synthesiser that the speakers learned from, what was heard against another sentence's words, and the
model's own sounds with their pieces in a random order. The last two show what a recogniser that knows the sentences
guesses. The first sound of each sense is kept as <speaker>-<sense>.wav.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from shutil import which
from time import monotonic
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.evaluate.metrics import spoken_form
from omni_jax.files import write_whole
from omni_jax.loading import load_lazily
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Messages
from omni_jax.weights.manifest import identity
from omni_jax.weights.parts import PARTS
from scripts.nano.codec_stage import lines_of
from scripts.nano.evaluation import (
    BATCH,
    FAILURES,
    LONGEST,
    Evaluator,
    Results,
    Row,
    digest_of,
    question_of,
    questions,
    rows_for_test,
)
from scripts.nano.recogniser import RECOGNISER, SETTINGS, Transcribe, pocketsphinx, recogniser
from scripts.nano.sounds import synthesised, wav
from scripts.nano.speech import VOICES, training_answers
from scripts.nano.words import NUMBERS

# The senses whose answers are spoken, prompts of each, to which as many are added whose answers the Talker was not
# trained on, and the longest speech in frames of 80 ms.
SPOKEN = ("digit", "digits", "add", "count", "scene", "move", "read", "remember", "written", "flash")
PROMPTS, FRAMES, SEED = 10, 180, 0
# Samples of a piece where pieces are put in a random order: 80 ms.
PIECE = SAMPLES_PER_SECOND * 8 // 100
# What is counted, as `read_speech` names it.
COUNTED = ("said", "new", "synthesised", "another", "shuffled")


@dataclass
class Counts:
    """What was said and heard, in words.

    errors: substitutions, omissions and insertions. numbers: words that are numbers, numbers_heard: those of them that
    were heard. strings: sentences with numbers; strings_right: those of them of which just their numbers were heard, in
    order. seconds: of sound.
    """

    sentences: int = 0
    words: int = 0
    errors: int = 0
    numbers: int = 0
    numbers_heard: int = 0
    strings: int = 0
    strings_right: int = 0
    seconds: float = 0.0
    misheard: list[dict[str, str]] = field(default_factory=list)

    def add(self, text: str, heard: str, seconds: float = 0.0) -> None:
        """Count one sentence, and keep it if it was misheard."""
        import jiwer

        right, known = spoken_form(text).split(), spoken_form(heard).split()
        if not right:
            return
        found = jiwer.process_words(" ".join(right), " ".join(known))
        equal = [chunk for chunk in found.alignments[0] if chunk.type == "equal"]
        hits = [word for chunk in equal for word in right[chunk.ref_start_idx : chunk.ref_end_idx]]
        self.sentences += 1
        self.words += len(right)
        self.errors += found.substitutions + found.deletions + found.insertions
        self.numbers += len(numbers := numbers_of(right))
        self.numbers_heard += len(numbers_of(hits))
        self.strings += bool(numbers)
        self.strings_right += bool(numbers) and numbers == numbers_of(known)
        self.seconds = round(self.seconds + seconds, 2)
        if right != known:
            self.misheard.append({"said": text, "heard": heard})

    def figures(self) -> dict[str, float]:
        """All that is counted, as plain values."""
        return {name: value for name, value in vars(self).items() if name != "misheard"}


def numbers_of(words: Sequence[str]) -> list[str]:
    """The words that are numbers, in order."""
    return [word for word in words if word in NUMBERS]


def check_speech(model: str | Path, output: Path) -> None:
    """InputError for what judging speech needs and is missing, a program, package or list, or speech in the model."""
    _sentences(output)
    pocketsphinx()
    try:
        import_module("jiwer")
    except ImportError as error:
        raise InputError("speech is judged by jiwer, which is missing; pip install jiwer") from error
    if which("flite") is None:
        raise InputError("flite is missing; install the Debian package flite")
    load_lazily(model, parts=(*PARTS,))


def evaluate_speech(evaluator: Evaluator, output: Path) -> Results:
    """The counts of each speaker, of transcripts that are kept or new ones."""
    answers, rows = training_answers(output), spoken_rows(output, evaluator.limit)
    transcribe = None
    for speaker in VOICES:
        digest, asked = _digest(rows, output, speaker, answers), questions(rows, output)
        if evaluator.kept(f"speech-{speaker}", digest) is None:
            transcribe, started = transcribe or recogniser(answers), monotonic()
            said = _spoken(evaluator, asked, speaker)
            transcripts = [_transcript(one, VOICES[speaker], transcribe, i) for i, one in enumerate(said)]
            values = {"seconds": round(monotonic() - started, 1), "transcripts": transcripts}
            evaluator.keep(
                f"speech-{speaker}", digest, values | {"examples": _write_examples(evaluator, rows, speaker, said)}
            )
    return read_speech(evaluator, output)


def read_speech(evaluator: Evaluator, output: Path) -> Results:
    """The counts of the speakers whose transcripts are kept, and examples."""
    results: Results = {"recogniser": RECOGNISER, "speakers": {}, "examples": []}
    if not any(evaluator.folder.glob("speech-*.json")):
        return results
    answers, rows, trained = training_answers(output), spoken_rows(output, evaluator.limit), trained_texts(output)
    for speaker in VOICES:
        held = evaluator.kept(f"speech-{speaker}", _digest(rows, output, speaker, answers))
        if held is None:
            continue
        transcripts = held["transcripts"]
        results["speakers"][speaker] = counts_of(transcripts, trained)
        for i, file in held["examples"].items():
            one, asked = transcripts[int(i)], question_of(rows[int(i)])
            told = {"said": one["text"], "heard": one["heard"], "file": file}
            results["examples"].append({"speaker": speaker, "asked": asked, **told})
    return results


def spoken_rows(output: Path, limit: int | None) -> list[Row]:
    """The test rows whose answers are spoken: the first of each sense, then some that the Talker was not trained on."""
    trained, chosen = trained_texts(output), []
    for sense in SPOKEN:
        rows = rows_for_test(output, sense, limit)
        new = [row for row in rows[PROMPTS:] if spoken_form(row["messages"][-1]["content"]) not in trained]
        chosen += rows[:PROMPTS] + new[:PROMPTS]
    return chosen


def trained_texts(output: Path) -> set[str]:
    """The sentences that the Talker was trained to say, as they are compared; InputError if they were not spoken."""
    texts = {line["text"] for line in lines_of(_sentences(output).parent, "train")}
    for file in (output / "aloud" / "aloud.jsonl", output / "spoken" / "train.jsonl"):
        if file.exists():
            with file.open() as lines:
                texts |= {json.loads(line)["messages"][-1]["content"] for line in lines}
    return {spoken_form(text) for text in texts}


def _sentences(output: Path) -> Path:
    """The file of what the speakers say; InputError if it is missing."""
    file = output / "speech" / "speech.jsonl"
    if not file.exists():
        raise InputError(
            f"{file} is missing; run the stage codec first, which writes this file before it trains: "
            "with --seconds 0 it pauses after the first step"
        )
    return file


def counts_of(transcripts: Sequence[dict[str, Any]], trained: set[str]) -> Results:
    """The counts of a speaker's transcripts, and some that were misheard; trained: sentences as `trained_texts` has."""
    counted = {name: Counts() for name in COUNTED}
    for i, one in enumerate(transcripts):
        text, seconds = one["text"], one["seconds"]
        counted["said"].add(text, one["heard"], seconds)
        if spoken_form(text) not in trained:
            counted["new"].add(text, one["heard"], seconds)
        counted["synthesised"].add(text, one["synthesised"])
        counted["another"].add(transcripts[i - 1]["text"], one["heard"])
        counted["shuffled"].add(text, one["shuffled"])
    figures = {name: counts.figures() for name, counts in counted.items()}
    return figures | {"misheard": counted["said"].misheard[:FAILURES]}


def shuffled(wave: np.ndarray, seed: int) -> np.ndarray:
    """The pieces of 80 ms of a wave [samples] in a random order."""
    pieces = [wave[begin : begin + PIECE] for begin in range(0, len(wave), PIECE)]
    order = np.random.default_rng([SEED, seed]).permutation(len(pieces))
    return np.concatenate([pieces[i] for i in order]) if pieces else wave


def _digest(rows: Sequence[Row], output: Path, speaker: str, answers: Sequence[str]) -> str:
    """A hash of what is asked of a speaker, and of what the recogniser knows."""
    known = sha256("\n".join(answers).encode()).hexdigest()
    return digest_of(questions(rows, output), LONGEST, FRAMES, SEED, speaker, VOICES[speaker], SETTINGS, known)


def _spoken(evaluator: Evaluator, conversations: Sequence[Messages], speaker: str) -> list[tuple[str, np.ndarray]]:
    """The greedy answers to conversations, each spoken with the default settings: float32 [samples] at 24 kHz."""
    said = []
    for begin in range(0, len(conversations), BATCH):
        batch = list(conversations[begin : begin + BATCH])
        spoken = {"speech": True, "speaker": speaker, "max_frames": FRAMES, "seed": SEED}
        for reply in evaluator.omni.generate(batch, max_new_tokens=LONGEST, **spoken):
            assert reply.audio is not None
            said.append((reply.text, reply.audio))
    return said


def _transcript(said: tuple[str, np.ndarray], voice: str, transcribe: Transcribe, number: int) -> dict[str, Any]:
    """What is heard of an answer, of the same sentence by the synthesiser, and of its sound in a random order."""
    text, wave = said

    def heard(sound: np.ndarray) -> str:
        return transcribe(sound, SAMPLES_PER_SECOND) if len(sound) else ""

    return {
        "text": text,
        "seconds": round(len(wave) / SAMPLES_PER_SECOND, 2),
        "heard": heard(wave),
        "shuffled": heard(shuffled(wave, number)),
        "synthesised": heard(synthesised(text.replace("\0", " "), voice, SAMPLES_PER_SECOND)) if text.strip() else "",
    }


def _write_examples(evaluator: Evaluator, rows: Sequence[Row], speaker: str, said: Sequence[Any]) -> dict[str, str]:
    """Write the first sound of each sense: the files by the numbers of their rows."""
    evaluator.folder.mkdir(parents=True, exist_ok=True)
    first = {row["sense"]: i for i, row in reversed(list(enumerate(rows)))}
    files = {str(i): f"{speaker}-{sense}.wav" for sense, i in sorted(first.items(), key=lambda one: one[1])}
    for i, file in files.items():
        write_whole(evaluator.folder / file, wav(said[int(i)][1], SAMPLES_PER_SECOND))
    return files


def speech_lines(results: Results) -> list[str]:
    """Lines of the printed table, one for each speaker."""
    return [
        f"{speaker:18}{one['said']['sentences']} sentences, {shares(one)}"
        for speaker, one in results["speakers"].items()
    ]


def shares(counted: Results) -> str:
    """Strings of numbers right and word error of a speaker, with the synthesiser's in brackets."""
    right, error = (
        f"{share(counted['said'], part, whole):.1%} ({share(counted['synthesised'], part, whole):.1%})"
        for part, whole in (("strings_right", "strings"), ("errors", "words"))
    )
    return f"numbers right, all of a sentence, {right}, word error {error}"


def share(counts: Mapping[str, Any], part: str, whole: str) -> float:
    """One count as a share of another."""
    return counts[part] / max(1, counts[whole])


def evaluate_held(output: Path, seed: int) -> str | None:
    """The report of how the Talker that was trained says held sentences, the one that is kept or a new one.

    None where there is no such Talker.
    """
    from scripts.nano.talker import held_report

    model, report = output / "talker" / "model", read_held(output)
    if report is None and model.exists():
        report = held_report(output, seed)
        _held(output).parent.mkdir(exist_ok=True)
        values = {"of": identity(model), "report": report}
        write_whole(_held(output), json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return report


def read_held(output: Path) -> str | None:
    """The report of held sentences that is kept, if it is of the Talker that was trained last."""
    model = output / "talker" / "model"
    if not (model.exists() and _held(output).exists()):
        return None
    held = json.loads(_held(output).read_text())
    return held["report"] if held["of"] == identity(model) else None


def _held(output: Path) -> Path:
    return output / "evaluation" / "talker.json"
