"""What one call asks for, checked, and what carries it out.

GenerationPlan (drawing, limits, voice, drafts) + batch or Prompt -> Generator -> Admission -> Batching
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm

import jax
from jax.sharding import Mesh

from omni_jax.config import OmniConfig
from omni_jax.decode.answers import FIRST_FRAMES, STREAM_FRAMES, STREAM_STEPS
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.engine import Engine, PlainEngine
from omni_jax.decode.keeping import Store
from omni_jax.decode.limits import Limits, seeds_of
from omni_jax.decode.memory import CacheNeed, Memory
from omni_jax.decode.prompt import Prompt, check_context, prompt_lengths, repeat_rows
from omni_jax.decode.reasoning import ends_inside_reasoning
from omni_jax.decode.request import requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.talker_loop import FRAMES
from omni_jax.decode.speech.voice import check_voice, repeated
from omni_jax.decode.text import CHUNK
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.speech import HEADER, OPENING
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import whole
from omni_jax.models.param import Declaration
from omni_jax.settings import Voice
from omni_jax.sharding import round_up_rows

# Slots unless the caller states a number.
SLOTS = 12


@dataclass(frozen=True, eq=False)
class GenerationPlan:
    """The settings of a call. voice: None for text alone. drafts: None for plain decoding."""

    sampling: Sampling
    limits: Limits
    voice: Voice | None
    drafts: DraftPlan | None

    def together(self, batch: Batch, seeds: list[int], config: OmniConfig, tokenizer: Tokenizer) -> Admission:
        """A request for each seed, the same number for each of the batch's prompts, side by side.

        Raises InputError for a prompt that does not fit the Thinker's context together with its reply, or the Talker's.
        """
        longest, limits = int(prompt_lengths(batch).max()), self.limits
        check_context(longest, limits.max_new_tokens, config.thinker.text.max_position_embeddings)
        requests, speech = requests_for(batch, limits, seeds, self.sampling), None
        copies = len(seeds) // len(batch.mask)
        for b, (ids, mask) in enumerate(zip(batch.token_ids, batch.mask, strict=True)):
            inside = ends_inside_reasoning(ids[mask], tokenizer)
            for request in requests[b * copies : (b + 1) * copies]:
                request.begins_inside_reasoning = inside
        if self.voice is not None:
            speech = SpeechRequest.read(repeat_rows(batch, copies), repeated(self.voice, copies), config)
        return Admission(batch, requests, speech)

    def alone(self, prompt: Prompt, number: int, config: OmniConfig, tokenizer: Tokenizer) -> Admission:
        """The request of a prompt, with what it states of its own; raises as `together`, and for bad settings."""
        text = config.thinker.text
        limits = self.limits.but(prompt.max_new_tokens, prompt.stop, prompt.stop_ids, text, tokenizer)
        voice = self.voice if prompt.speech else None
        if voice is not None and prompt.voice is not None:
            check_voice(voice := prompt.voice, 1, config)
        if voice is not None and prompt.speaker is not None:
            voice = replace(voice, speaker=prompt.speaker)
        own = replace(self, sampling=prompt.sampling or self.sampling, limits=limits, voice=voice)
        admission = own.together(prompt.batch, seeds_of(prompt.seed, 1), config, tokenizer)
        (request,) = admission.requests
        request.ends, request.cancels = prompt.ends, prompt.cancelled
        request.drafts, request.number = prompt.draft, number
        return admission

    def caches(self, rows: int, prompt_tokens: int, max_new_tokens: int, config: OmniConfig) -> list[CacheNeed]:
        """What `rows` rows fill at most."""
        text, tokens, drafts = config.thinker.text, prompt_tokens + max_new_tokens, self.drafts
        if drafts is None:
            caches = [CacheNeed("thinker", text, rows, tokens)]
        else:
            # Drafts may be written past the end of the context.
            most = text.max_position_embeddings + drafts.slots_written
            stacks = {"thinker": text} if drafts.stack is None else {"thinker": text, "drafter": drafts.stack}
            caches = [
                CacheNeed(
                    "thinker", replace(s, max_position_embeddings=most), rows, tokens + drafts.slots_written, name
                )
                for name, s in stacks.items()
            ]
        if self.voice is not None and config.talker is not None:
            columns = prompt_tokens + OPENING - HEADER
            caches.append(CacheNeed("talker", config.talker.text, rows, columns + self.voice.max_frames))
        return caches


@dataclass(frozen=True, eq=False)
class Generator:
    """The parts of a model that generation runs on: plans become admissions and the loop that runs them.

    params, declarations, meshes: of the parts that are loaded, by name. embed_for_talker: gives the Thinker's token
    embeddings [V, D] on the Talker's devices. memory: what is free for caches. Nothing here reads a weight, so a bad
    request is refused within a second.
    """

    params: Mapping[str, dict]
    declarations: Mapping[str, Declaration]
    meshes: Mapping[str, Mesh | None]
    config: OmniConfig
    tokenizer: Tokenizer
    embed_for_talker: Callable[[], jax.Array]
    memory: Memory

    def together(self, plan: GenerationPlan, batch: Batch, seeds: list[int]) -> Admission:
        """The requests of a batch that run all at once. Raises InputError for what does not fit context or memory."""
        admission = plan.together(batch, seeds, self.config, self.tokenizer)
        longest = max(request.prompt_tokens for request in admission.requests)
        self.check_memory(plan, len(seeds), longest, plan.limits.max_new_tokens)
        return admission

    def alone(self, plan: GenerationPlan, prompt: Prompt, number: int, rows: int) -> Admission:
        """The request of a prompt in one of `rows` rows, which all become as long as the longest; raises likewise."""
        admission = plan.alone(prompt, number, self.config, self.tokenizer)
        (request,) = admission.requests
        if admission.speech is not None:
            plan = replace(plan, voice=admission.speech.voice)
        self.check_memory(plan, rows, request.prompt_tokens, request.max_new_tokens)
        return admission

    def batching(
        self,
        plan: GenerationPlan,
        rows: int,
        first: Admission | None = None,
        waiting: Iterator[Admission | None] | None = None,
        steps: int = CHUNK,
        frames: int = FRAMES,
        first_frames: int = FRAMES,
        piece: int | None = None,
        store: Store | None = None,
    ) -> Batching:
        """The loop that carries out a plan.

        piece, store: as in `PlainEngine`; the other arguments are those of `Batching`.
        """
        params, declaration, text = self.params["thinker"], self.declarations["thinker"], self.config.thinker.text
        plain = PlainEngine(params, declaration, text, plan.sampling, plan.limits.stop_ids, piece, store)
        engine: Engine = plain if plan.drafts is None else SpeculativeEngine(plain, plan.drafts)
        speakers = None if plan.voice is None else self._speakers(plan.voice, rows)
        return Batching(engine, rows, first, waiting, speakers, steps, frames, first_frames)

    def streaming(
        self,
        plan: GenerationPlan,
        rows: int,
        first: Admission | None = None,
        waiting: Iterator[Admission | None] | None = None,
        piece: int | None = None,
        store: Store | None = None,
    ) -> Batching:
        """As `batching`, for replies that are read and heard while they are made: in short steps."""
        steps = STREAM_STEPS, STREAM_FRAMES, FIRST_FRAMES
        return self.batching(plan, rows, first, waiting, *steps, piece, store)

    def speakers(self, voice: Voice, rows: int, request: SpeechRequest) -> Speakers:
        """Rows that say texts that are known, each as long as `request`; InputError if memory does not hold them.

        voice: by which codes are drawn where a request has none of its own. There are as many more rows as make the
        mesh divide them.
        """
        assert self.config.talker is not None
        rows = round_up_rows(rows, self.meshes["talker"])
        columns = int((request.prompt.length + request.budget).max())
        need = CacheNeed("talker", self.config.talker.text, rows, columns)
        self.memory.check([need], "say a shorter text, or lower max_frames")
        return self._speakers(voice, rows)

    def _speakers(self, voice: Voice, rows: int) -> Speakers:
        params, declaration = self.params["talker"], self.declarations["talker"]
        return Speakers(params, declaration, self.embed_for_talker, self.config, voice, rows)

    def slots(self, plan: GenerationPlan, slots: int | None, most: int) -> int:
        """The number of slots, whole for the meshes, by default what memory holds, at most SLOTS.

        most: new tokens of a reply whose prompt has no limit of its own. Raises InputError for more slots than memory
        holds without any prompt.
        """
        parts = ("thinker",) if plan.voice is None else ("thinker", "talker")

        shards = lcm(*(round_up_rows(1, self.meshes[part]) for part in parts))

        def rounded(rows: int) -> int:
            return -(-rows // shards) * shards

        if slots is not None:
            rows = rounded(whole("slots", slots, "have at least one"))
            self.check_memory(plan, rows, 0, plan.limits.max_new_tokens)
            return rows
        # With a prompt, which is one token at least.
        caches = plan.caches(rounded(SLOTS), 1, most, self.config)
        return rounded(max(1, min(SLOTS, self.memory.fitting_rows(caches))))

    def check_memory(self, plan: GenerationPlan, rows: int, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise InputError for requests whose caches would not fit, all rows as long as they may become."""
        caches = plan.caches(rows, prompt_tokens, max_new_tokens, self.config)
        remedy = "have fewer slots, conversations or replies at once, or lower max_new_tokens"
        self.memory.check(caches, remedy if plan.voice is None else f"{remedy} or max_frames")
