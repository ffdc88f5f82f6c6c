"""Omni: the one object that owns the parameters and the compiled steps.

load -> prepare (NumPy) -> Session (encode media, prefill, decode in chunks) -> Reply, or Events as they come
                              `-> SpeechSession (frames of codes) -> vocode (waveform) -'
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.config import OmniConfig
from omni_jax.decode.answers import finished, repeated, spoken, spoken_events, written, written_events
from omni_jax.decode.arguments import explained
from omni_jax.decode.draft.plan import Drafting, Draftings
from omni_jax.decode.draft.session import DraftedSession
from omni_jax.decode.limits import Limits, check_conversations, copies_of
from omni_jax.decode.media import encode_media
from omni_jax.decode.memory import Cache, check_memory, fitting_rows
from omni_jax.decode.reply import Event, Reply
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session, pad_length, seeds_of
from omni_jax.decode.slots import Prompt, Slots
from omni_jax.decode.speech.session import MAX_FRAMES, SpeechSession, Voice
from omni_jax.decode.speech.vocode import Vocoder, as_codes, vocode
from omni_jax.decode.text import forward
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.messages import is_conversation
from omni_jax.inputs.options import read_defaults
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.values import flag, whole
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import place, round_up_rows
from omni_jax.weights.drafters import Drafter
from omni_jax.weights.parts import PARTS

Messages = list[dict[str, Any]]
# The limit and the number of slots of `generate_many` unless told.
MAX_NEW_TOKENS, SLOTS = 1024, 12


class Omni:
    """A loaded model; build one with `omni_jax.load`.

    params: nested dict of arrays, {"thinker": ..., "talker": ..., "code2wav": ...}, of the parts that are loaded.
    declarations: the declarations of these parts, static under jit. meshes: where each part lies, None for one device.
    mesh_reason: what an automatic mesh was chosen for.
    """

    def __init__(
        self,
        params: dict,
        config: OmniConfig,
        processor: Processor,
        mesh: Mesh | Mapping[str, Mesh] | None = None,
        read: Callable[[], dict] | None = None,
    ):
        """mesh: where the parameters lie: one for all parts or one for each; None if all are on one device.

        read: gives the parameters when they are first needed; until then `params` are jax.ShapeDtypeStructs.
        """
        self.params, self._read = params, read
        self.config = config
        self.processor = processor
        self.meshes = dict(mesh) if isinstance(mesh, Mapping) else dict.fromkeys(params, mesh)
        self.mesh_reason = ""
        self.declarations = {
            part: declare(PARTS[part], getattr(config, part), mesh=self.meshes[part]) for part in params
        }
        self._draftings = Draftings(config, self.meshes.get("thinker"))

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

    def _read_weights(self) -> None:
        """Read the parameters, unless they are there."""
        if self._read is not None:
            for part, arrays in self._read().items():
                # In place: sessions that were made before hold the dict of a part.
                self.params[part].update(arrays)
            self._read = None

    def _check_loaded(self, *parts: str) -> None:
        """InputError, with the remedy, unless all these parts were loaded."""
        missing = [part for part in parts if part not in self.params]
        if any(getattr(self.config, part) is None for part in missing):
            raise InputError(
                f"this checkpoint holds no {' and '.join(missing)}; convert the whole model, with all its parts"
            )
        if missing:
            remedy = f"load it with parts={(*self.params, *missing)}, from a checkpoint that holds them"
            raise InputError(f"the model is loaded without its {' and '.join(missing)}; {remedy}")

    @explained
    def prepare(
        self,
        messages: Messages | list[Messages],
        *,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
        media: Mapping[str, Any] | None = None,
        thinking: bool | None = None,
        padding: str = "right",
    ) -> Batch:
        """Messages to the arrays that the model takes, NumPy only; see `Processor.prepare`.

        media: options of pictures, sounds and videos by name, such as {"max_pixels": 401408, "nframes": 16}, for all
        parts that do not state their own.
        thinking: whether the chat template lets a hybrid model think first; None leaves it to the template.
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

    def logits(self, batch: Batch) -> jax.Array:
        """Teacher-forced Thinker logits of a prepared batch, float32 [B, T, V]; rows at padding mean nothing.

        Where several processes share the model, all must ask, and each can read all.
        """
        if not isinstance(batch, Batch):
            raise InputError(
                f"logits takes a prepared batch, not a {type(batch).__name__}; call prepare(messages) first"
            )
        declaration, params = self._part("thinker")
        T = batch.token_ids.shape[1]
        batch = pad_length(batch, bucket(T))
        media = encode_media(params, batch, declaration)
        first = np.argmax(batch.mask, axis=1).astype(np.int32)
        return forward(params, batch.token_ids, batch.position_ids, first, media, declaration=declaration)[:, :T]

    def vocode(self, codes: Any) -> np.ndarray:
        """Codes int [Q, F] or [B, Q, F] to a waveform, float32 [samples] or [B, samples] at 24 kHz.

        Raises InputError for codes that are out of range or of another number of codebooks.
        """
        self._check_loaded("code2wav")
        assert self.config.code2wav is not None
        codes = as_codes(codes, self.config.code2wav)
        waves = self._sound(codes if codes.ndim == 3 else codes[None])
        return np.stack(waves) if codes.ndim == 3 else waves[0]

    @explained
    def generate(
        self, messages: Messages | list[Messages], *,
        n: int | None = None, max_new_tokens: int = 1024,
        stop: str | Sequence[str] | None = None, stop_ids: Sequence[int] | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, logprobs: int | None = None,
        use_audio_in_video: bool = False, tools: list[dict] | None = None, fps: float | None = None,
        media: Mapping[str, Any] | None = None, thinking: bool | None = None,
        speech: bool = False, speaker: str | Sequence[str] = "ethan", speech_temperature: float = 0.9,
        speech_top_k: int = 50, speech_top_p: float = 1.0, speech_repetition_penalty: float = 1.05,
        max_frames: int = MAX_FRAMES,
        drafter: Drafter | None = None, draft_tokens: int | Literal["auto"] | None = None,
        draft_tree: tuple[int, int] | None = None, draft_sampling: bool = False,
    ) -> Reply | list[Reply] | list[list[Reply]]:  # fmt: skip
        """Answer one conversation, or each of a list of them (rows may hold different media).

        n: several replies to each conversation, as a list; reply i of seed s is that of seed s + i alone. stop: texts
        that end a reply, which ends before the first of them. stop_ids: token ids that end one, by default the end of
        the assistant's turn. temperature 0 is greedy. seed: one for all rows or one per row; a row's reply depends on
        its own seed and prompt alone. logprobs: report log-probabilities of the reply's tokens and of this many
        alternatives to each, 0 to 20. fps, media, thinking: as in `prepare`. speech: say the replies too, as
        `speaker` (one for all rows or one per row), for at most `max_frames` frames of 80 ms; the penalty is on codes
        said before, also when greedy. drafter: proposes `draft_tokens` tokens a round, by default as many as it was
        trained for; "auto" measures once what rounds take, and follows what stands; an EAGLE-3 drafter may propose a
        tree of `draft_tree` levels and candidates, (7, 10) by its authors. It changes the time and nothing else,
        unless with `draft_sampling` drafts are drawn too: at high temperatures more of them stand, and the reply is
        another one from the same distribution. Raises InputError for messages, media or settings that cannot be used,
        and for a prompt that does not fit the context together with its reply.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logprobs)
        limits, copies = self._limits(max_new_tokens, stop, stop_ids), copies_of(n, sampling)
        rows = 1 if is_conversation(messages) else len(messages)
        self._check_memory(rows * copies, 0, limits.max_new_tokens)
        seeds = seeds_of(seed, rows, copies)
        drawing = (speech_temperature, speech_top_k, speech_top_p, speech_repetition_penalty)
        voice = self._voice(speech, speaker, rows, drawing, max_frames)
        drafting = self._draftings.settle(drafter, draft_tokens, draft_tree, draft_sampling)
        asked = {"use_audio_in_video": use_audio_in_video, "tools": tools, "fps": fps, "media": media}
        batch = self.prepare(messages, **asked, thinking=thinking)
        session, speaking = self._sessions(batch, sampling, limits, seeds, voice, drafting, copies)
        self._read_weights()
        tokenizer = self.processor.tokenizer
        replies = written(session, tokenizer) if speaking is None else spoken(session, speaking, self._sound, tokenizer)
        grouped = replies if n is None else [replies[i : i + copies] for i in range(0, len(replies), copies)]
        return grouped[0] if is_conversation(messages) else grouped

    @explained
    def generate_many(
        self, conversations: Iterable[Messages | Prompt | None], *, slots: int | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None, stop_ids: Sequence[int] | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int = 0, logprobs: int | None = None,
        media: Mapping[str, Any] | None = None, thinking: bool | None = None,
        drafter: Drafter | None = None, draft_tokens: int | Literal["auto"] | None = None,
        draft_tree: tuple[int, int] | None = None, draft_sampling: bool = False,
    ) -> Iterator[tuple[int, Reply]]:  # fmt: skip
        """Answer conversations, `slots` at a time: the number of each, counted from 0, and its reply, as they end.

        They are taken from the iterable as slots come free, and each reply is what `generate` makes of it alone. By
        default there are 12 slots, or as many as memory holds at `max_new_tokens`; there are as many more as make a
        mesh divide them. Arguments as there; a `Prompt` instead of messages is prepared already and has a seed and a
        limit of its own, and None, which is not counted, stands for "none at the moment, ask again when a reply is
        out". Bad settings are raised at the call, a conversation that cannot be used when its turn has come.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logprobs)
        # Until a conversation comes, a limit that nobody stated is none: prompts have their own.
        limits = self._limits(1 if max_new_tokens is None else max_new_tokens, stop, stop_ids)
        most, (seed,) = MAX_NEW_TOKENS if max_new_tokens is None else limits.max_new_tokens, seeds_of(seed, 1)
        drafting = self._draftings.settle(drafter, draft_tokens, draft_tree, draft_sampling)
        check_conversations(conversations)
        read_defaults(media, None, False)
        rows = self._slots(slots, limits.max_new_tokens)
        thinking = None if thinking is None else flag("thinking", thinking)

        def prepared() -> Iterator[Prompt | None]:
            for asked in conversations:
                if asked is None or isinstance(asked, Prompt):
                    yield asked
                else:
                    yield Prompt(self.prepare(asked, media=media, thinking=thinking), seed, most)

        def session(prompt: Prompt) -> Session:
            own = replace(limits, max_new_tokens=prompt.max_new_tokens)
            # All slots become as long as the longest conversation.
            made, _ = self._sessions(prompt.batch, sampling, own, prompt.seed, None, drafting, beside=rows - 1)
            self._read_weights()
            return made

        return finished(Slots(prepared(), session, rows, self.meshes.get("thinker")), self.processor.tokenizer)

    @explained
    def stream(
        self, messages: Messages, *,
        max_new_tokens: int = 1024,
        stop: str | Sequence[str] | None = None, stop_ids: Sequence[int] | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int = 0, logprobs: int | None = None,
        use_audio_in_video: bool = False, tools: list[dict] | None = None, fps: float | None = None,
        media: Mapping[str, Any] | None = None, thinking: bool | None = None,
        speech: bool = False, speaker: str = "ethan", speech_temperature: float = 0.9,
        speech_top_k: int = 50, speech_top_p: float = 1.0, speech_repetition_penalty: float = 1.05,
        max_frames: int = MAX_FRAMES,
        drafter: Drafter | None = None, draft_tokens: int | Literal["auto"] | None = None,
        draft_tree: tuple[int, int] | None = None, draft_sampling: bool = False,
    ) -> Iterator[Event]:  # fmt: skip
        """Answer one conversation piece by piece; arguments as in `generate`.

        The pieces of text join to the text that `generate` returns, those of audio to its waveform, and the last event
        carries the whole reply. Speech begins while the text is still being written. No part of a stop string is ever
        shown: text that may be its beginning waits until tokens have decided it. Bad input is raised at the call, not
        at the first event.
        """
        if not is_conversation(messages):
            raise InputError("stream takes one conversation (a list of messages); use generate for a batch")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logprobs)
        limits, seeds = self._limits(max_new_tokens, stop, stop_ids), seeds_of(seed, 1)
        drawing = (speech_temperature, speech_top_k, speech_top_p, speech_repetition_penalty)
        voice = self._voice(speech, speaker, 1, drawing, max_frames)
        drafting = self._draftings.settle(drafter, draft_tokens, draft_tree, draft_sampling)
        asked = {"use_audio_in_video": use_audio_in_video, "tools": tools, "fps": fps, "media": media}
        batch = self.prepare(messages, **asked, thinking=thinking)
        return self._events(*self._sessions(batch, sampling, limits, seeds, voice, drafting))

    def _events(self, session: Session, speaking: SpeechSession | None) -> Iterator[Event]:
        self._read_weights()
        if speaking is None:
            yield from written_events(session, self.processor.tokenizer)
        else:
            declaration, params = self._part("code2wav")
            assert self.config.code2wav is not None
            vocoder = Vocoder(params, declaration, self.config.code2wav)
            yield from spoken_events(session, speaking, vocoder, self.processor.tokenizer)

    def _limits(self, max_new_tokens: int, stop: str | Sequence[str] | None, stop_ids: Sequence[int] | None) -> Limits:
        """Where replies end, checked; without stop ids at the end of the assistant's turn."""
        self._check_loaded("thinker")
        ids = [self.config.im_end_token_id] if stop_ids is None else stop_ids
        return Limits.read(max_new_tokens, stop, ids, self.config.thinker.text, self.processor.tokenizer)

    def _voice(
        self,
        speech: bool,
        speaker: str | Sequence[str],
        rows: int,
        drawing: tuple[float, int, float, float],
        max_frames: int,
    ) -> Voice | None:
        """A checked voice, None without speech; InputError for wrong settings, or a model without what speaks."""
        temperature, top_k, top_p, penalty = drawing
        try:
            sampling = Sampling(temperature, top_k, top_p, repetition_penalty=penalty)
        except InputError as error:
            raise InputError(f"speech_{error}") from error
        voice = Voice(speaker, sampling, max_frames)
        if not flag("speech", speech):
            whole("max_frames", max_frames, f"give at most {MAX_FRAMES}, or ask for speech too", most=2**31 - 1)
            return None
        voice.check(rows, self.config)
        self._check_loaded(*PARTS)
        return voice

    def _sessions(
        self,
        batch: Batch,
        sampling: Sampling,
        limits: Limits,
        seed: int | Sequence[int],
        voice: Voice | None,
        drafting: Drafting | None,
        copies: int = 1,
        beside: int = 0,
    ) -> tuple[Session, SpeechSession | None]:
        """What writes the replies, `copies` to each row with a seed each, and with a voice what speaks them.

        beside: further rows of the same cache. No weight is read here, so that a request is refused within a second.
        """
        declaration, params = self.declarations["thinker"], self.params["thinker"]
        media = bool(batch.vision) or batch.audio is not None
        taps = (self.config.talker.accept_hidden_layer,) if voice and media and self.config.talker else ()
        text = self.config.thinker.text
        asked = (params, declaration, text, batch, sampling, limits.max_new_tokens, seed, limits.stop_ids, taps)
        more = (limits.stops, copies)
        session = Session(*asked, *more) if drafting is None else DraftedSession(*asked, drafting, *more)
        self._check_memory(len(session.rows) + beside, session.longest, session.max_new_tokens, voice)
        if voice is None:
            return session, None
        declaration, talker = self.declarations["talker"], self.params["talker"]
        batch, voice = repeated(batch, copies), voice.repeated(copies)
        return session, SpeechSession(
            talker, declaration, lambda: self._embed_for_talker, self.config, batch, session, voice
        )

    def _slots(self, slots: int | None, max_new_tokens: int) -> int:
        """How many slots there are, whole for the mesh; InputError for more than memory holds without any prompt."""
        mesh = self.meshes["thinker"]
        if slots is not None:
            rows = round_up_rows(whole("slots", slots, "have at least one"), mesh)
            self._check_memory(rows, 0, max_new_tokens)
            return rows
        # With a prompt, which is one token at least.
        cache = Cache("thinker", self.config.thinker.text, round_up_rows(SLOTS, mesh), 1 + max_new_tokens)
        return round_up_rows(max(1, min(SLOTS, fitting_rows([cache], self.params, self.meshes))), mesh)

    def _check_memory(self, rows: int, prompt_tokens: int, max_new_tokens: int, voice: Voice | None = None) -> None:
        """Raise InputError for a request whose caches would not fit, all rows as long as they may become."""
        caches = [Cache("thinker", self.config.thinker.text, rows, prompt_tokens + max_new_tokens)]
        remedy = "have fewer slots, conversations or replies at once, or lower max_new_tokens"
        if voice is not None and self.config.talker is not None:
            caches.append(Cache("talker", self.config.talker.text, rows, prompt_tokens + voice.max_frames))
            remedy += " or max_frames"
        check_memory(caches, self.params, self.meshes, remedy)

    @cached_property
    def _embed_for_talker(self) -> jax.Array:
        """The Thinker's token embeddings [V, D], on the Talker's devices."""
        embed, mesh = self.params["thinker"]["embed"], self.meshes["talker"]
        return embed if mesh == self.meshes["thinker"] else place(embed, ("vocab", "embed"), mesh)

    def _sound(self, codes: np.ndarray, lengths: list[int] | None = None) -> list[np.ndarray]:
        """The waveform of each row of codes [B, Q, F]."""
        declaration, params = self._part("code2wav")
        assert self.config.code2wav is not None
        return vocode(params, declaration, self.config.code2wav, codes, lengths)
