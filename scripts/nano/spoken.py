"""The model's answers spoken by both speakers, and how much of them a recogniser understands.

    test prompts -> generate(speech=True) -> waves -> recogniser -> words against those of the written answer

The ceiling is what the recogniser understands of the same sentences spoken by the synthesiser that the speakers learned
from; the floor compares what it heard with another sentence's words. evaluation/speech.json holds the counts, and
evaluation/<speaker>-<sense>.wav the first sentence of each.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from omni_jax.evaluate.metrics import spoken_form
from omni_jax.files import write_whole
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Messages
from scripts.nano.evaluation import BATCH, FAILURES, LONGEST, Asked, Results, question_of, questions, rows_for_test
from scripts.nano.recogniser import RECOGNISER, recogniser
from scripts.nano.robustness import wav
from scripts.nano.speech import VOICES, training_answers, trimmed
from scripts.nano.words import NUMBERS

# The senses whose answers are spoken, prompts of each, and the longest speech in frames of 80 ms.
SPOKEN = ("digit", "digits", "add", "count", "scene", "move", "read", "remember", "written", "flash")
PROMPTS, FRAMES, SEED = 10, 150, 0

Heard = Callable[[np.ndarray, int], str]


@dataclass
class Counts:
    """Words that were to be heard, errors in them, number words and those of them that were heard, seconds of sound."""

    words: int = 0
    errors: int = 0
    numbers: int = 0
    numbers_heard: int = 0
    seconds: float = 0.0
    misheard: list[dict[str, str]] = field(default_factory=list)

    def add(self, text: str, heard: str, seconds: float = 0.0) -> None:
        """Count one sentence, and keep it if it was misheard."""
        import jiwer

        right, known = spoken_form(text).split(), spoken_form(heard)
        if not right:
            return
        found = jiwer.process_words(" ".join(right), known)
        equal = [chunk for chunk in found.alignments[0] if chunk.type == "equal"]
        hits = [word for chunk in equal for word in right[chunk.ref_start_idx : chunk.ref_end_idx]]
        self.words += len(right)
        self.errors += found.substitutions + found.deletions + found.insertions
        self.numbers += sum(word in NUMBERS for word in right)
        self.numbers_heard += sum(word in NUMBERS for word in hits)
        self.seconds = round(self.seconds + seconds, 2)
        if right != known.split():
            self.misheard.append({"said": text, "heard": heard})

    def figures(self) -> dict[str, float]:
        """All that is counted, as plain values."""
        names = ("words", "errors", "numbers", "numbers_heard", "seconds")
        return {name: getattr(self, name) for name in names}


def evaluate_speech(asked: Asked, output: Path) -> Results:
    """The counts of each speaker, those that are kept or new ones."""
    of = repr((SPOKEN, PROMPTS, FRAMES, SEED))
    if held := asked.kept("speech", of):
        return held
    hear = recogniser(training_answers(output))
    rows = [row for sense in SPOKEN for row in rows_for_test(output, sense, asked.limit)[:PROMPTS]]
    results: Results = {"recogniser": RECOGNISER, "speakers": {}, "examples": []}
    for speaker, voice in VOICES.items():
        said = _spoken(asked, questions(rows, output), speaker)
        heard = [hear(wave, SAMPLES_PER_SECOND) for _, wave in said]
        results["speakers"][speaker] = _counts(said, heard, voice, hear)
        first = {row["sense"]: i for i, row in reversed(list(enumerate(rows)))}
        for sense, i in first.items():
            name, (text, wave) = f"{speaker}-{sense}.wav", said[i]
            write_whole(asked.folder / name, wav(wave, SAMPLES_PER_SECOND))
            example = {"speaker": speaker, "sense": sense, "asked": question_of(rows[i]), "said": text}
            results["examples"].append({**example, "heard": heard[i], "file": name})
    return asked.keep("speech", of, results)


def _spoken(asked: Asked, conversations: Sequence[Messages], speaker: str) -> list[tuple[str, np.ndarray]]:
    """The greedy answers to conversations, each with its speech float32 [samples] at 24 kHz."""
    said = []
    for begin in range(0, len(conversations), BATCH):
        batch = list(conversations[begin : begin + BATCH])
        spoken = {"speech": True, "speaker": speaker, "max_frames": FRAMES, "seed": SEED}
        for reply in asked.omni.generate(batch, max_new_tokens=LONGEST, **spoken):
            assert reply.audio is not None
            said.append((reply.text, reply.audio))
    return said


def _counts(said: Sequence[tuple[str, np.ndarray]], heard: Sequence[str], voice: str, hear: Heard) -> Results:
    """The counts of a speaker's sentences, of the same by the synthesiser's voice, and of what was not said."""
    own, ceiling, floor = Counts(), Counts(), Counts()
    for i, ((text, wave), words) in enumerate(zip(said, heard, strict=True)):
        own.add(text, words, len(wave) / SAMPLES_PER_SECOND)
        floor.add(said[i - 1][0], words)
        if text.strip():
            recorded = _synthesised(text, voice)
            ceiling.add(text, hear(recorded, SAMPLES_PER_SECOND), len(recorded) / SAMPLES_PER_SECOND)
    counted = {"said": own, "ceiling": ceiling, "floor": floor}
    kept = {"misheard": own.misheard[:FAILURES]}
    return {name: counts.figures() for name, counts in counted.items()} | {"sentences": len(said)} | kept


def _synthesised(text: str, voice: str) -> np.ndarray:
    """A sentence by the synthesiser, as the speakers learned it: float32 [samples] at 24 kHz."""
    import soundfile
    from scipy.signal import resample_poly

    with TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        wave, rate = soundfile.read(path, dtype="float32")
    return trimmed(resample_poly(wave, SAMPLES_PER_SECOND, rate), SAMPLES_PER_SECOND)


def speech_lines(results: Results) -> list[str]:
    """Lines of the printed table, one for each speaker."""
    return [f"{speaker:18}{one['sentences']} sentences, {shares(one)}" for speaker, one in results["speakers"].items()]


def shares(counted: Results) -> str:
    """Numbers right and word error of a speaker, with the ceiling's in brackets."""
    right, error = (
        f"{share(counted['said'], part, whole):.1%} ({share(counted['ceiling'], part, whole):.1%})"
        for part, whole in (("numbers_heard", "numbers"), ("errors", "words"))
    )
    return f"numbers right {right}, word error {error}"


def share(counts: Results, part: str, whole: str) -> float:
    """One count as a share of another."""
    return counts[part] / max(1, counts[whole])
