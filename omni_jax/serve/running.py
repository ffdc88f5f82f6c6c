"""How the server runs a model: prompts become requests in slots, and each request is followed as events.

The only module of the server that knows the decoding loop; `engine` calls it from its one thread.
"""

from collections.abc import Iterator
from dataclasses import replace

import jax

from omni_jax.decode.answers import Follower
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.keeping import Store
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import Request
from omni_jax.decode.speech.aloud import READ_ALOUD, VOICE, Said
from omni_jax.distributed import min_over_processes
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni
from omni_jax.serve.readings import Readings
from omni_jax.settings import Drafting, Settings, Voice
from omni_jax.weights.drafters import Drafter
from omni_jax.weights.parts import PARTS


class Running:
    """A model with a number of slots, and perhaps a drafter.

    slots: replies that run at once. speaks: whether they can be spoken. piece: tokens of a prompt that run at once,
    None for all.
    """

    def __init__(
        self,
        omni: Omni,
        slots: int | None = None,
        drafter: Drafter | None = None,
        drafting: Drafting | None = None,
        piece_tokens: int | None = None,
        keep_bytes: int = 0,
    ):
        """slots: by default as many as memory holds, at most 12. drafting: how the drafter drafts.

        piece_tokens: a longer prompt is run in pieces of so many tokens, between which the others write on. keep_bytes:
        of features of media and of caches, which prompts that begin like earlier ones go on from; slots and replies get
        what they leave of the memory. Raises InputError for what the model, or the memory, cannot do.
        """
        self.omni, self.piece, self._keep_bytes = omni, piece_tokens, keep_bytes
        self.speaks = all(part in omni.params for part in PARTS)
        settings = Settings(drafting=drafting or Drafting())
        # Each prompt has a limit of its own.
        self.plan = omni._plan(settings, replace(settings.ending, max_new_tokens=1), self.speaks, drafter, 1)
        generator = omni._make_generator()
        memory = generator.memory.beside("thinker", keep_bytes, "lower --keep-mib, or set it to 0")
        self.generator = replace(generator, memory=memory)
        self._aloud: Batch | None = None
        most = self.generator.slots(self.plan, slots, settings.ending.max_new_tokens)
        # Each process has memory of its own.
        self.slots = most if jax.process_count() == 1 else min_over_processes(most)

    @property
    def voices(self) -> list[str]:
        """The names of the model's speakers, none if it does not speak."""
        talker = self.omni.config.talker
        return [name for name, _ in talker.speakers] if self.speaks and talker is not None else []

    def admission(self, prompt: Prompt, number: int) -> Admission:
        """The request of a prompt; InputError for one that does not fit, or asks for what the model cannot do."""
        if prompt.speech and not self.speaks:
            self.omni._check_loaded(*PARTS)
        return self.generator.alone(self.plan, prompt, number, self.slots)

    def batching(self, waiting: Iterator[Admission | None]) -> Batching:
        """The loop that runs requests as they come; a new one has kept nothing yet."""
        store = Store(self._keep_bytes) if self._keep_bytes else None
        return self.generator.streaming(self.plan, self.slots, waiting=waiting, piece=self.piece, store=store)

    def said(self, text: str, voice: Voice, seed: int) -> Said:
        """A text to read aloud; InputError for one that cannot be, or that this model cannot say."""
        self.omni._check_loaded(*PARTS)
        if self._aloud is None:
            self._aloud = self.omni.prepare(READ_ALOUD)
        return Said.read(text, seed, self._aloud, voice, self.omni.config, self.omni.processor.tokenizer)

    def readings(self) -> Readings:
        """What reads texts aloud, as many at once as there are slots."""
        return Readings(
            self.slots, lambda said: self.generator.speakers(VOICE, self.slots, said.request), self.omni._make_vocoder
        )

    def follower(self, admission: Admission) -> Follower:
        """What follows the request of an admission."""
        (request,) = admission.requests
        make_vocoder = None if admission.speech is None else self.omni._make_vocoder
        return Follower(request, self.omni.processor.tokenizer, make_vocoder)


def failed_request(batching: Batching, requests: list[Request]) -> Request | None:
    """Which of these requests most likely made the loop fail: the one whose prompt was being run, else the longest."""
    running = [request for request in requests if request in batching.rows and not request.complete]
    return min(
        batching.entering or running, key=lambda r: (-r.prompt_tokens - len(r.token_ids), r.number), default=None
    )
