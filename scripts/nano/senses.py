"""All senses of omni-nano, and every sentence that they ask and answer in training."""

from functools import partial
from pathlib import Path

from scripts.nano import hear, text
from scripts.nano.rows import Sense
from scripts.nano.see import see_senses, see_wordings
from scripts.nano.voices import Bank


def senses(directory: Path, scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses; directory: of voices and downloads. scale: of their numbers of rows."""
    bank = Bank(voices_path(directory))
    seen = see_senses(directory, partial(hear.say, bank), scale)
    return (*text.text_senses(scale), *hear.hear_senses(bank, scale), *seen)


def voices_path(directory: Path) -> Path:
    """Where the clips of the voices are."""
    return directory / "voices"


def wordings() -> list[str]:
    """The sentences that tokens are learned from."""
    return [*text.wordings(), *hear.wordings(), *see_wordings()]
