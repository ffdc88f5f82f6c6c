"""Omni: the one object that owns the parameters and the compiled steps.

load -> prepare (NumPy) -> Batching of Requests on an Engine (media, prefill, chunks) -> Reply, or Events as they come
                              `-> speech (frames of codes) -> vocode (waveform) ---------'
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from threading import RLock
from typing import Any, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.config import OmniConfig
from omni_jax.decode.answers import events_of, replies_in_turn, replies_together
from omni_jax.decode.arguments import GenerateArguments, explained
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.draft.plan import KnownDrafters
from omni_jax.decode.generation import GenerationPlan, Generator
from omni_jax.decode.keeping import Store
from omni_jax.decode.limits import Limits, check_conversations, copies_of, seeds_of
from omni_jax.decode.media import encode_media
from omni_jax.decode.memory import Memory
from omni_jax.decode.prompt import Prompt, pad_length
from omni_jax.decode.reply import Event, Reply
from omni_jax.decode.speech.aloud import READ_ALOUD, VOICE, Said
from omni_jax.decode.speech.sounds import Sounds
from omni_jax.decode.speech.vocode import Vocoder, as_codes
from omni_jax.decode.speech.voice import check_voice
from omni_jax.decode.text import forward
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.messages import is_conversation
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.values import flag, whole
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Declaration, bind
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Media, Thinker
from omni_jax.settings import Ending, Keywords, Settings, Voice
from omni_jax.sharding import place
from omni_jax.weights.drafters import Drafter
from omni_jax.weights.parts import PARTS, declare_parts

Messages = list[dict[str, Any]]
# Messages, alone or as {"messages": ..., "tools": ...}.
Conversation = Messages | dict[str, Any]


class Omni:
    """A loaded model; build one with `omni_jax.load`.

    params: nested dict of arrays, {"thinker": ..., "talker": ..., "code2wav": ...}, of the parts that are loaded.
    declarations: the declarations of these parts, static under jit. meshes: where each part is, None for one device.
    mesh_reason: what an automatic mesh was chosen for.
    """

    def __init__(
        self,
        params: dict,
        config: OmniConfig,
        processor: Processor,
        mesh: Mesh | Mapping[str, Mesh] | None = None,
        read: Callable[[], dict] | None = None,
        mesh_reason: str = "",
    ):
        """mesh: where the parameters are: one for all parts or one for each; None if all are on one device.

        read: gives the parameters when they are first needed; until then `params` are jax.ShapeDtypeStructs.
        mesh_reason: what an automatic mesh was chosen for.
        """
        self.params, self._read, self._reading = params, read, RLock()
        self.config, self.processor = config, processor
        self.meshes = dict(mesh) if isinstance(mesh, Mapping) else dict.fromkeys(params, mesh)
        self.mesh_reason = mesh_reason
        self.declarations = {
            part: replace(declaration, mesh=self.meshes[part])
            for part, declaration in declare_parts(config, tuple(params)).items()
        }
        # The Thinker's embeddings and their copy on the Talker's devices.
        self._copied: tuple[jax.Array, jax.Array] | None = None
        self._drafters = KnownDrafters(config, self.meshes.get("thinker"))
        self._sounds = Sounds(lambda: self._part("code2wav"), config.code2wav)

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} on {mesh.size if mesh else 1}" for part, mesh in self.meshes.items())
        return f"Omni({parts} device(s), {self.config.thinker.text.num_layers} layers)"

    @property
    def thinker(self) -> Thinker:
        """The Thinker as an NNX module with its parameters in place."""
        return bind(*self._part("thinker"))

    @property
    def talker(self) -> Talker:
        """The Talker as an NNX module with its parameters in place."""
        return bind(*self._part("talker"))

    @property
    def code2wav(self) -> Code2Wav:
        """The vocoder as an NNX module with its parameters in place."""
        return bind(*self._part("code2wav"))

    def _part(self, part: str) -> tuple[Declaration, dict]:
        """The declaration and parameters of a part, for `bind`; InputError if it was not loaded."""
        self._check_loaded(part)
        self._read_weights()
        return self.declarations[part], self.params[part]

    def _read_weights(self, rows: int = 0) -> None:
        """Read the parameters, unless they are there; rows: of replies to be heard, whose sound is prepared for."""
        with self._reading:
            if self._read is not None:
                for part, arrays in self._read().items():
                    # In place: engines that were made before hold the dict of a part.
                    self.params[part].update(arrays)
                self._read = None
        if rows:
            self._sounds.begin(rows)

    def _check_loaded(self, *parts: str) -> None:
        """InputError, with the remedy, unless all these parts were loaded."""
        missing = [part for part in parts if part not in self.params]
        if any(getattr(self.config, part) is None for part in missing):
            raise InputError(
                f"this checkpoint holds no {' and '.join(missing)}; convert the whole model, with all its parts, if it "
                "has them (Thinking and Captioner models do not)"
            )
        if missing:
            remedy = f"load it with parts={(*self.params, *missing)}, from a checkpoint that holds them"
            raise InputError(f"the model is loaded without its {' and '.join(missing)}; {remedy}")

    @explained
    def prepare(
        self,
        messages: Conversation | list[Messages],
        *,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
        media: Mapping[str, Any] | None = None,
        thinking: bool | None = None,
        padding: str = "right",
    ) -> Batch:
        """Messages to the arrays that the model takes, NumPy only; errors as of `Processor.prepare`.

        messages: a conversation, or a list of conversations, each of which becomes a row.
        use_audio_in_video: listen to the sound tracks of the videos, in step with their frames.
        tools: functions that the model may call, as in OpenAI's API.
        fps: frames sampled per second of video.
        media: options of pictures, sounds and videos by name, such as {"max_pixels": 9999}, for parts that state none.
        thinking: whether a hybrid model's chat template lets it think; None: as the template does.
        padding: of shorter rows, "right" or "left".
        """
        return self.processor.prepare(
            messages,
            use_audio_in_video=flag("use_audio_in_video", use_audio_in_video),
            tools=tools,
            fps=fps,
            media=media,
            padding=padding,
            enable_thinking=None if thinking is None else flag("thinking", thinking),
        )

    def encode(self, batch: Batch) -> Media | None:
        """The media of a batch from `prepare` as `thinker(..., media=)` takes them; None where it has none."""
        self._check_batch("encode", batch)
        return encode_media(self._part("thinker")[1], batch, self.declarations["thinker"])

    def logits(self, batch: Batch) -> jax.Array:
        """Teacher-forced Thinker logits of a batch from `prepare`, float32 [B, T, V]; rows at padding mean nothing.

        Where several processes share the model, all must ask, and each can read all.
        """
        self._check_batch("logits", batch)
        declaration, params = self._part("thinker")
        T = batch.token_ids.shape[1]
        batch = pad_length(batch, bucket(T))
        media, first = self.encode(batch), np.argmax(batch.mask, axis=1).astype(np.int32)
        return forward(params, batch.token_ids, batch.position_ids, first, media, declaration=declaration)[:, :T]

    def _check_batch(self, name: str, batch: Batch) -> None:
        if not isinstance(batch, Batch):
            raise InputError(
                f"{name} takes a prepared batch, not a {type(batch).__name__}; call prepare(messages) first"
            )

    def vocode(self, codes: Any) -> np.ndarray:
        """Codes int [Q, F] or [B, Q, F] to a waveform, float32 [samples] or [B, samples] at 24 kHz.

        Raises InputError for codes that are out of range or of another number of codebooks.
        """
        self._check_loaded("code2wav")
        assert self.config.code2wav is not None
        codes = as_codes(codes, self.config.code2wav)
        waves = self._sounds.of(codes if codes.ndim == 3 else codes[None])
        return np.stack(waves) if codes.ndim == 3 else waves[0]

    def speak(self, text: str, *, messages: Messages = READ_ALOUD, voice: Voice = VOICE, seed: int = 0) -> Reply:
        """Say a text word for word; the codes are those of a reply of these words that `generate` has spoken.

        Raises InputError for a text without words, and for speech that the Talker's context or memory does not hold.
        messages: what the text answers, without media; by default a request to read it aloud.
        """
        self._check_loaded(*PARTS)
        said = Said.read(text, seed, self.prepare(messages), voice, self.config, self.processor.tokenizer)
        speakers = self._make_generator().speakers(voice, 1, said.request)
        self._read_weights(rows=1)
        speaker = said.say(speakers)
        return said.reply(speaker, self._sounds.of(speaker.codes[None])[0])

    @overload
    def generate(self, messages: Conversation, *, n: None = None, **settings: Unpack[GenerateArguments]) -> Reply: ...

    @overload
    def generate(self, messages: Conversation, *, n: int, **settings: Unpack[GenerateArguments]) -> list[Reply]: ...

    @overload
    def generate(
        self, messages: list[Messages], *, n: None = None, **settings: Unpack[GenerateArguments]
    ) -> list[Reply]: ...

    @overload
    def generate(
        self, messages: list[Messages], *, n: int, **settings: Unpack[GenerateArguments]
    ) -> list[list[Reply]]: ...

    @explained
    def generate(
        self, messages: Conversation | list[Messages], *,
        n: int | None = None, speech: bool = False, drafter: Drafter | None = None,
        **settings: Unpack[Keywords],
    ) -> Reply | list[Reply] | list[list[Reply]]:  # fmt: skip
        """Answer one conversation, or each of a list of them (rows may hold different media).

        Returns a Reply for one conversation and a list for a list; with n, a list of n replies in the place of each.
        Raises InputError for messages, media or settings that cannot be used, and for a prompt that does not fit the
        context together with its reply. A row's reply depends on its own seed and prompt alone.

        messages: a conversation, or a list of conversations.
        n: several replies to each; reply i of seed s is the reply of seed s + i alone.
        speech: whether the replies are also spoken.
        drafter: drafts tokens that the model then verifies. In float32 the tokens stay the same, unless with
            draft_sampling.
        settings: all that `omni_jax.settings` describes, each by its name.
        """
        request = Settings.read(settings)
        copies, rows = copies_of(n, request.sampling), 1 if is_conversation(messages) else len(messages)
        plan = self._plan(request, request.ending, speech, drafter, rows)
        generator = self._make_generator()
        generator.check_memory(plan, rows * copies, 0, plan.limits.max_new_tokens)
        seeds = seeds_of(request.seed, rows, copies)
        batch = self.prepare(messages, **vars(request.preparation))
        admission = generator.together(plan, batch, seeds)
        self._read_weights(len(seeds) if speech else 0)
        batching = generator.batching(plan, len(seeds), admission)
        replies = replies_together(batching, admission.requests, self.processor.tokenizer, self._sounds.of)
        grouped = replies if n is None else [replies[i : i + copies] for i in range(0, len(replies), copies)]
        return grouped[0] if is_conversation(messages) else grouped

    @explained
    def generate_many(
        self, conversations: Iterable[Conversation | Prompt | None], *,
        slots: int | None = None, piece_tokens: int | None = None, keep_bytes: int = 0,
        speech: bool = False, drafter: Drafter | None = None, **settings: Unpack[Keywords],
    ) -> Iterator[tuple[int, Reply]]:  # fmt: skip
        """Answer conversations, `slots` at a time: the number of each, counted from 0, and its reply, as they end.

        Each reply is the one that `generate` gives for its conversation alone. Bad settings are raised at the call. A
        conversation that cannot be used is raised when its turn has come, after the replies that were under way.

        conversations: taken as slots come free. Messages; or a `Prompt`, which is prepared already and has a seed, a
            limit and perhaps a speaker of its own, and can cancel its reply; or None, not counted: asked again before
            every chunk.
        slots: by default 12, or the number that memory holds at `max_new_tokens`; rounded up to what a mesh divides.
        piece_tokens: a longer prompt is run in pieces of this many tokens, between which the others write on; by
            default at once.
        keep_bytes: of features of media and of caches, which prompts that begin like earlier ones go on from; by
            default nothing is kept.
        speech, drafter, settings: as in `generate`, for all conversations; one seed and one speaker.
        """
        stated: dict[str, Any] = {**settings}
        if stated.get("max_new_tokens") is None:
            stated.pop("max_new_tokens", None)
        request = Settings.read(stated)
        # Until a conversation comes, a limit that nobody stated is none: prompts have their own.
        ending = request.ending if "max_new_tokens" in stated else replace(request.ending, max_new_tokens=1)
        plan, (seed,) = self._plan(request, ending, speech, drafter, 1), seeds_of(request.seed, 1)
        check_conversations(conversations)
        # One for the whole call: what its own caches take later is not counted twice.
        generator, most = self._make_generator(), request.ending.max_new_tokens
        rows = generator.slots(plan, slots, most)
        prompts = (
            given
            if given is None or isinstance(given, Prompt)
            else Prompt(self.prepare(given, **vars(request.preparation)), seed, most)
            for given in conversations
        )
        piece = None if piece_tokens is None else whole("piece_tokens", piece_tokens, "run at least one token at once")
        store = Store(keep) if (keep := whole("keep_bytes", keep_bytes, "give a number of bytes", least=0)) else None
        waiting = self._admissions(generator, plan, prompts, rows)
        batching = generator.batching(plan, rows, waiting=waiting, piece=piece, store=store)
        return replies_in_turn(batching, self.processor.tokenizer, self._sounds.of)

    def _admissions(
        self, generator: Generator, plan: GenerationPlan, prompts: Iterator[Prompt | None], rows: int
    ) -> Iterator[Admission | None]:
        """Each prompt as its request in one of `rows` rows, numbered from 0; None stays None."""
        number = 0
        for prompt in prompts:
            if prompt is None:
                yield None
                continue
            admission = generator.alone(plan, prompt, number, rows)
            self._read_weights(0 if admission.speech is None else 1)
            yield admission
            number += 1

    @explained
    def stream(
        self, messages: Conversation, *, speech: bool = False, drafter: Drafter | None = None,
        **settings: Unpack[Keywords],
    ) -> Iterator[Event]:  # fmt: skip
        """Answer one conversation piece by piece; arguments as in `generate`.

        The pieces of text join to the text that `generate` returns, those of audio to its waveform, and the last event
        carries the whole reply. Speech begins while the text is still being written. No part of a stop string is ever
        shown: text that may be its beginning waits until tokens have decided it. Bad input is raised at the call, not
        at the first event.
        """
        if not is_conversation(messages):
            raise InputError("stream takes one conversation (a list of messages); use generate for a batch")
        request = Settings.read(settings)
        plan, seeds = self._plan(request, request.ending, speech, drafter, 1), seeds_of(request.seed, 1)
        batch = self.prepare(messages, **vars(request.preparation))
        generator = self._make_generator()
        admission = generator.together(plan, batch, seeds)
        batching = generator.streaming(plan, 1, admission)
        return self._events(batching, admission)

    def _events(self, batching: Batching, admission: Admission) -> Iterator[Event]:
        self._read_weights(0 if admission.speech is None else 1)
        speaks = self._make_vocoder if admission.speech is not None else None
        yield from events_of(batching, admission.requests[0], self.processor.tokenizer, speaks)

    def _make_vocoder(self) -> Vocoder:
        """The vocoder of one reply that is heard while it is made."""
        return self._sounds.vocoder()

    def _plan(
        self, request: Settings, ending: Ending, speech: bool, drafter: Drafter | None, rows: int
    ) -> GenerationPlan:
        """The settings, checked for this model and a number of rows; without stop ids replies end with the turn."""
        self._check_loaded("thinker")
        ids = [self.config.im_end_token_id] if ending.stop_ids is None else ending.stop_ids
        text, tokenizer = self.config.thinker.text, self.processor.tokenizer
        limits = Limits.read(ending.max_new_tokens, ending.stop, ids, text, tokenizer)
        voice, drafting = self._voice(speech, request.voice, rows), request.drafting
        drafts = self._drafters.resolve_draft_plan(
            drafter, drafting.draft_tokens, drafting.draft_tree, drafting.draft_sampling
        )
        return GenerationPlan(request.sampling, limits, voice, drafts)

    def _voice(self, speech: bool, voice: Voice, rows: int) -> Voice | None:
        """The voice, checked for a number of rows; None without speech. Raises InputError if nothing here can speak."""
        if not flag("speech", speech):
            for name, value in vars(Voice()).items():
                if getattr(voice, name) != value:
                    raise InputError(f"{name} is a setting of speech; ask for speech too, or leave it out")
            return None
        check_voice(voice, rows, self.config)
        self._check_loaded(*PARTS)
        return voice

    def _make_generator(self) -> Generator:
        """What carries out plans on the parts that are loaded; what memory is free is read now."""
        return Generator(
            self.params,
            self.declarations,
            self.meshes,
            self.config,
            self.processor.tokenizer,
            embed_for_talker=self._embed_for_talker,
            memory=Memory.read(self.params, self.meshes),
        )

    def _embed_for_talker(self) -> jax.Array:
        """The Thinker's token embeddings [V, D], on the Talker's devices."""
        embed, mesh = self.params["thinker"]["embed"], self.meshes["talker"]
        if mesh == self.meshes["thinker"]:
            return embed
        if self._copied is None or self._copied[0] is not embed:
            self._copied = embed, place(embed, ("vocab", "embed"), mesh)
        return self._copied[1]
