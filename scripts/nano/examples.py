"""The stage examples: test rows small and free enough to be kept in the repository, for tests and the demonstration.

    the senses of SENSES, voices of KINDS -> tests/data/nano/<sense>.jsonl, tests/data/nano/<sense>/

They are the test's in voices, combinations, collections and wordings, and no rows of the evaluation: their seed is
another one.
"""

import json
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from omni_jax.files import write_whole
from scripts.nano import hear
from scripts.nano.rows import Sample, Sense, Split, row_of, samples
from scripts.nano.see import see_senses
from scripts.nano.senses import voices_path
from scripts.nano.voices import Bank, Voice

# How many of each sense.
SENSES = {"scene": 16, "written": 8, "when": 16, "digits": 12, "red": 16}
# Voices whose recordings may be redistributed without conditions that bind the repository.
KINDS = ("flite", "kokoro")
SEED = 1_000


class Free(Bank):
    """A bank that speaks in voices of KINDS alone."""

    def voice(self, draw: np.random.Generator, split: Split) -> Voice:
        """As of `Bank`."""
        while (voice := super().voice(draw, split)).kind not in KINDS:
            pass
        return voice


def write_examples(output: Path, examples: Path, seed: int) -> dict[str, int]:
    """Write the rows and their media: how many of each sense."""
    bank = Free(voices_path(output))
    known = (*hear.hear_senses(bank), *see_senses(output, partial(hear.say, bank)))
    return {sense.name: write_rows(sense, examples, seed) for sense in known if sense.name in SENSES}


def write_rows(sense: Sense, examples: Path, seed: int) -> int:
    """Write the rows of a sense and their media, sounds as FLAC: their number."""
    made = [_smaller(sample) for sample in islice(samples(sense, "test", SEED + seed), SENSES[sense.name])]
    folder = examples / sense.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(made):
        for name, content in sample.media.items():
            write_whole(folder / f"{number:02d}-{name}", content)
        row = row_of(sample, f"{sense.name}.{number}", sense.name, f"{sense.name}/{number:02d}-")
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(examples / f"{sense.name}.jsonl", "".join(lines))
    return len(made)


def _smaller(sample: Sample) -> Sample:
    """A sample whose sounds are FLAC, without loss."""
    import soundfile

    media, messages = {}, json.dumps(sample.messages)
    for name, content in sample.media.items():
        if name.endswith(".wav"):
            flac, sound = BytesIO(), soundfile.read(BytesIO(content), dtype="int16")
            soundfile.write(flac, *sound, format="FLAC", subtype="PCM_16")
            messages = messages.replace(name, name.replace(".wav", ".flac"))
            name, content = name.replace(".wav", ".flac"), flac.getvalue()
        media[name] = content
    return Sample(json.loads(messages), sample.answer, media)
