"""How the server runs a model: prompts become requests in slots, and each request is followed as events.

The only module of the server that knows the decoding loop; `engine` calls it from its one thread.
"""

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import numpy as np

from omni_jax.decode.answers import STREAM_FRAMES, STREAM_STEPS, Waveform, logprobs_of, reply_of
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.engine import Engine
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reasoning import ReasoningSplitter
from omni_jax.decode.reply import Event
from omni_jax.decode.request import Request
from omni_jax.decode.speech.vocode import Vocoder
from omni_jax.decode.stops import StopStrings
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.omni import Omni
from omni_jax.settings import Drafting, Settings
from omni_jax.weights.drafters import Drafter
from omni_jax.weights.parts import PARTS


class Running:
    """A model with a number of slots, and perhaps a drafter.

    slots: replies that run at once. speaks: whether they can be spoken.
    """

    def __init__(self, omni: Omni, slots: int | None = None, drafter: Drafter | None = None, drafting=Drafting()):  # noqa: B008
        """slots: by default as many as memory holds, at most 12. Raises InputError for what the model cannot do."""
        self.omni = omni
        self.speaks = all(part in omni.params for part in PARTS)
        settings = Settings(drafting=drafting)
        # Each prompt has a limit of its own.
        self.plan = omni._plan(settings, replace(settings.ending, max_new_tokens=1), self.speaks, drafter, 1)
        self.generator = omni._make_generator()
        self.slots = self.generator.slots(self.plan, slots, settings.ending.max_new_tokens)

    def read_weights(self) -> None:
        """Read the weights, unless they are there."""
        self.omni._read_weights()

    def admission(self, prompt: Prompt, number: int) -> Admission:
        """The request of a prompt; InputError for one that does not fit, or asks for what the model cannot do."""
        if prompt.speech and not self.speaks:
            self.omni._check_loaded(*PARTS)
        return self.generator.alone(self.plan, prompt, number, self.slots)

    def batching(self, waiting: Iterator[Admission | None]) -> Batching:
        """The loop that runs requests as they come."""
        return self.generator.batching(self.plan, self.slots, waiting=waiting, steps=STREAM_STEPS, frames=STREAM_FRAMES)

    def follower(self, admission: Admission) -> "Follower":
        """What follows the request of an admission."""
        (request,), vocoder = admission.requests, None
        if admission.speech is not None:
            declaration, params = self.omni._part("code2wav")
            assert self.omni.config.code2wav is not None
            vocoder = Vocoder(params, declaration, self.omni.config.code2wav)
        return Follower(request, self.omni.processor.tokenizer, vocoder)


class Follower:
    """The events of one request while it runs, and its reply."""

    def __init__(self, request: Request, tokenizer: Tokenizer, vocoder: Vocoder | None):
        self.request, self._tokenizer, self._vocoder = request, tokenizer, vocoder
        self._text = (request.limits.stops or StopStrings(tokenizer, ())).watch()
        self._splitter = ReasoningSplitter(request.begins_inside_reasoning)
        self._written, self._frames, self._seconds = 0, 0, 0.0
        self._waves = [np.zeros(0, np.float32)]

    def events(self) -> Iterator[Event]:
        """What is new since the last call: at most a piece of text, and a piece of speech."""
        if new := self.request.token_ids[self._written :]:
            self._text.add(new)
            piece = self._splitter.add(self._text.piece())
            logprobs = logprobs_of(self.request, self._written)
            self._written += len(new)
            yield Event(piece.text, new, logprobs=logprobs, reasoning=piece.reasoning)
        speaker = self.request.speaker
        if self._vocoder is not None and speaker is not None and speaker.made > self._frames:
            start = perf_counter()
            self._waves.append(self._vocoder.add(speaker.codes[:, self._frames :]))
            self._frames = speaker.made
            self._seconds += perf_counter() - start
            yield Event("", [], audio=self._waves[-1])

    def finish(self, engine: Engine) -> Iterator[Event]:
        """What is new, and a last event with the whole reply; engine: the one that drew it."""
        yield from self.events()
        sound = None if self._vocoder is None else Waveform(np.concatenate(self._waves), self._seconds)
        times = {"seconds": self.request.seconds}
        reply = reply_of(self.request, engine.stats(self.request), self._tokenizer, times, sound)
        piece = self._splitter.add(self._text.last_piece(), last=True)
        yield Event(piece.text, [], reply, reasoning=piece.reasoning)


def failed_request(batching: Batching, requests: list[Request]) -> Request | None:
    """Which of these requests most likely made the loop fail: one that was being admitted, else the longest."""
    ahead = batching._next
    known = [*batching.rows, *(ahead.requests if ahead is not None else ())]
    entering = [request for request in requests if request not in known]
    return min(entering or requests, key=lambda r: (-r.prompt_tokens - len(r.token_ids), r.number), default=None)
