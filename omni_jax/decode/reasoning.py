"""Reasoning and answer in a reply's text: what a thinking model writes between `<think>` and `</think>`, and after it.

A reply begins inside its reasoning if its prompt ends with `<think>`, as some templates have it; else only if `<think>`
is the first thing it writes. Elsewhere in a text the marks are ordinary text. Line breaks at both ends of the
reasoning, and those between `</think>` and the answer, belong to neither: the public template writes them itself.
"""

import re
from dataclasses import dataclass

import numpy as np

from omni_jax.inputs.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
# Tokens at the end of a prompt that can spell <think> and line breaks, in a vocabulary without such a token.
END_TOKENS = 16


@dataclass(frozen=True)
class Piece:
    """A piece of a reply's text: of its answer, and of its reasoning."""

    text: str
    reasoning: str


class ReasoningSplitter:
    """Splits a reply's text as it comes; the joined pieces are the same for any cut.

    found: whether there is reasoning, even if it is empty.
    """

    def __init__(self, begins_inside: bool):
        self.found = begins_inside
        self._undecided = not begins_inside  # whether the text so far may become <think>
        self._inside = self._at_start = begins_inside
        self._held = ""

    def add(self, text: str, last: bool = False) -> Piece:
        """What the next piece of text adds; `last`: nothing follows, so nothing is held back any more."""
        self._held += text
        reasoning = ""
        if self._undecided:
            self._begin(last)
        if self._inside:
            reasoning = self._take_reasoning(last)
        if self._undecided or self._inside:
            return Piece("", reasoning)
        return Piece(self._take(len(self._held)), reasoning)

    def _begin(self, last: bool) -> None:
        """Find out whether the reply begins with <think>, if enough of it is there."""
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._held = begun.removeprefix(OPEN)
            self.found = self._inside = self._at_start = True
        self._undecided = not (self.found or last) and OPEN.startswith(begun)

    def _take_reasoning(self, last: bool) -> str:
        """The reasoning that is certain: without the line breaks that may be its last, and what may become </think>."""
        end = self._held.find(CLOSE)
        if end >= 0:
            reasoning = self._take(end).rstrip("\n")
            self._held = self._held.removeprefix(CLOSE)
            self._inside, self._at_start = False, True
            return reasoning
        if not last:
            begun = next(n for n in range(len(CLOSE) - 1, -1, -1) if self._held.endswith(CLOSE[:n]))
            return self._take(len(self._held[: len(self._held) - begun].rstrip("\n")))
        return self._take(len(self._held)).rstrip("\n")

    def _take(self, length: int) -> str:
        """The next characters, without line breaks if they are the first of their kind."""
        taken, self._held = self._held[:length], self._held[length:]
        if self._at_start:
            taken = taken.lstrip("\n")
            self._at_start = not taken
        return taken


def split_reasoning(text: str, begins_inside: bool) -> tuple[str, str | None]:
    """The answer and the reasoning in the whole text of a reply; None for a reply without any."""
    splitter = ReasoningSplitter(begins_inside)
    piece = splitter.add(text, last=True)
    return piece.text, piece.reasoning if splitter.found else None


def ends_inside_reasoning(token_ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether a prompt, int32 [T] with its mask bool [T], ends with an open <think>."""
    end = token_ids[mask][-END_TOKENS:]
    return bool(re.search(f"{OPEN}\\s*$", tokenizer.decode(end, skip_special=False)))
