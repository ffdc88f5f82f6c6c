"""Ask nano, the small model of the package, about a recording, a handwritten digit, a scene and a video with its sound.

    python -m scripts.demo --out demo

Every question is put twice: the first time its programs are compiled, or read from the disk; the second time counts.
The last answer is spoken. Nothing that is asked was trained on: voices, handwriting, combinations and wordings are
those of the tests, from `tests/data/nano`.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import omni_jax as oj
from omni_jax.omni import Omni
from omni_jax.rows.media import located
from scripts.nano.judging import is_right

EXAMPLES = Path(__file__).resolve().parent.parent / "tests" / "data" / "nano"
# Rows of each file that are asked.
ASKED = (("digits", 3), ("written", 1), ("scene", 3), ("when", 1), ("red", 0))
SPOKEN = ("digits", 9)


@dataclass(frozen=True)
class Demo:
    """Ask, listen, and draw what was heard and said."""

    out: Path = Path("demo")
    """Folder of answer.wav and answer.png."""
    speaker: str = "chelsie"
    """Who answers aloud."""


def row_of(sense: str, number: int) -> dict[str, Any]:
    """A row of the examples."""
    return json.loads((EXAMPLES / f"{sense}.jsonl").read_text().splitlines()[number])


def ask(omni: Omni, row: dict[str, Any], **settings: Any) -> tuple[Any, float]:
    """The reply to a row's question, and its seconds without compilation."""
    conversation = located(row["messages"][:-1], EXAMPLES)
    omni.generate(conversation, max_new_tokens=64, **settings)
    start = time.perf_counter()
    reply = omni.generate(conversation, max_new_tokens=64, **settings)
    return reply, time.perf_counter() - start


def said_aloud(omni: Omni, speaker: str) -> tuple[dict[str, Any], Any, float]:
    """The row whose answer a speaker says, the reply with its sound at 24 kHz, and its seconds without compilation."""
    row = row_of(*SPOKEN)
    return row, *ask(omni, row, speech=True, speaker=speaker, max_frames=150)


def shown(row: dict[str, Any], text: str, seconds: float) -> bool:
    """Print a question, what it is about and the answer: whether that is right."""
    parts = row["messages"][-2]["content"]
    media = " ".join(f"tests/data/nano/{part[part['type']]}" for part in parts if part["type"] != "text")
    question = " ".join(part["text"] for part in parts if part["type"] == "text")
    right = is_right(row, text)
    print(f"{media}\n  {question}\n  {text}   ({seconds:.2f} s{'' if right else '; WRONG'})", flush=True)
    return right


def draw(row: dict[str, Any], reply: Any, path: Path) -> None:
    """Write a picture of the sound that was heard and of the answer that was said."""
    import matplotlib

    matplotlib.use("Agg")
    import librosa
    import matplotlib.pyplot as plt

    from scripts.plot_speech import draw_mel

    (heard,) = [part["audio"] for part in row["messages"][-2]["content"] if part["type"] == "audio"]
    samples, rate = librosa.load(EXAMPLES / heard, sr=None, mono=True)
    figure, axes = plt.subplots(2, 1, figsize=(9, 5), layout="constrained")
    titles = (f"heard: {Path(heard).name}", f"said: {reply.text}")
    for place, title, sound, hertz in zip(axes, titles, (samples, reply.audio), (rate, 24_000), strict=True):
        draw_mel(place, sound, int(hertz))
        place.set(title=title, xlabel="seconds")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Run the demonstration: 1 if an answer was wrong."""
    options = tyro.cli(Demo, prog="python -m scripts.demo", description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    omni = oj.load("nano")
    right = [shown(row, *_text(ask(omni, row))) for row in (row_of(*one) for one in ASKED)]
    row, reply, seconds = said_aloud(omni, options.speaker)
    right.append(shown(row, reply.text, seconds))
    oj.write_sound(options.out / "answer.wav", reply.audio)
    draw(row, reply, options.out / "answer.png")
    print(f"  aloud, as {options.speaker}: {options.out}/answer.wav, drawn in {options.out}/answer.png")
    return 0 if all(right) else 1


def _text(found: tuple[Any, float]) -> tuple[str, float]:
    return found[0].text, found[1]


if __name__ == "__main__":
    sys.exit(main())
