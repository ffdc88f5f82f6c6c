"""Stop strings: a reply ends before the first one in its text, whatever tokens spell it.

Matching is on bytes: same positions in valid UTF-8, and it works on incomplete characters. The token that
completes a stop string is the last of a reply; which token that is follows from the reply's tokens alone, so neither
chunks nor a batch change it. Until then, the end of the text is held back where it may begin a stop string.
"""

import codecs
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import listed, shown

# Characters of a stop string: all its beginnings are compared with the end of a reply.
LONGEST = 10_000


@dataclass(frozen=True, eq=False)
class StopStrings:
    """Texts that end a reply, in the order in which they were given, for the tokens of a tokenizer."""

    tokenizer: Tokenizer
    strings: tuple[str, ...]

    @classmethod
    def read(cls, stop: Any, tokenizer: Tokenizer) -> "StopStrings":
        """Those that `stop` states: None, a text or a list of them. InputError for what could never end a reply."""
        remedy = "give a text or a list of texts"
        strings = [] if stop is None else [stop] if isinstance(stop, str) else listed("stop", stop, remedy)
        for text in strings:
            if not isinstance(text, str):
                raise InputError(f"stop holds {shown(text)}; {remedy}")
            if not text:
                raise InputError("stop holds an empty text, which would end every reply at once; leave it out")
            if len(text) > LONGEST:
                raise InputError(f"stop holds a text of {len(text):,} characters; give at most {LONGEST:,}")
            if "\ufffd" in text:
                raise InputError(f"stop {shown(text)}: U+FFFD only stands for broken characters; leave it out")
            control = next((literal for literal in tokenizer.special if literal in text), None)
            if control is not None:
                number = tokenizer.token_id(control)
                raise InputError(f"stop {shown(text)}: {control} is no text of a reply; give stop_ids=[{number}]")
            tokenizer.encode(text)  # half of a surrogate pair is refused there
        return cls(tokenizer, tuple(strings))

    def watch(self) -> "Watch":
        """The watch that looks for them in one reply."""
        return Watch(self)


class Watch:
    """The text of one reply as its tokens come, up to the first stop string.

    met: the stop string that ended it, if one has. text_end: how many bytes are text for certain.
    """

    def __init__(self, stops: StopStrings):
        self.met: str | None = None
        self.text_end = 0
        self._stops, self._tokenizer = [(text.encode(), text) for text in stops.strings], stops.tokenizer
        self._data = bytearray()
        self._ends: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0

    def add(self, ids: Sequence[int]) -> int:
        """Read more tokens: the number of them that belong to the reply, with the one that completes a stop string."""
        for count, token in enumerate(ids if self.met is None else ()):
            before = len(self._data)
            self._data += self._tokenizer.token_bytes(token)
            self._ends.append(len(self._data))
            found = [
                (at, text)
                for stop, text in self._stops
                if (at := self._data.find(stop, max(0, before + 1 - len(stop)))) >= 0
            ]
            if found:
                self.text_end, self.met = min(found, key=lambda place: place[0])
                return count + 1
        if self.met is None:
            self.text_end = len(self._data) - self._begun()
            return len(ids)
        return 0

    @property
    def tokens(self) -> int:
        """The number of tokens that are text for certain, each of them whole."""
        return bisect_right(self._ends, self.text_end)

    def text(self) -> str:
        """The whole text of a reply that has ended."""
        return self._data[: self._end()].decode("utf-8", "replace")

    def piece(self) -> str:
        """What has become text for certain since the last piece, in whole characters."""
        new, self._shown = self._data[self._shown : self.text_end], self.text_end
        return self._decoder.decode(bytes(new))

    def last_piece(self) -> str:
        """What is left of the text once the reply has ended."""
        return self._decoder.decode(bytes(self._data[self._shown : self._end()]), final=True)

    def _end(self) -> int:
        return len(self._data) if self.met is None else self.text_end

    def _begun(self) -> int:
        """The number of bytes at the end that may begin a stop string."""
        longest = max((len(stop) for stop, _ in self._stops), default=1) - 1
        firsts = {stop[0] for stop, _ in self._stops}
        begins = (n for n in range(min(longest, len(self._data)), 0, -1) if self._data[-n] in firsts)
        tails = (bytes(self._data[-n:]) for n in begins)
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop, _ in self._stops)), 0)
