"""Omni: the one object that owns the parameters and the compiled steps.

load -> prepare (NumPy) -> Session (encode media, prefill, decode in chunks) -> Reply, or Events as they come
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omni_jax import checkpoint, sharding
from omni_jax.config import OmniConfig
from omni_jax.decode.generate import forward
from omni_jax.decode.media import encode_media
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session, pad_length
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.messages import is_conversation
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.tokenizer import TextStream
from omni_jax.models.param import bind, declare
from omni_jax.models.thinker import Thinker

Messages = list[dict[str, Any]]
STREAM_STEPS = 8
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Reply:
    """An answer: its text, its token ids (the stop token included), and stats.

    stats: prompt_tokens, new_tokens, finish_reason ("stop" or "length"), prefill_seconds and decode_seconds; the times
    are those of the whole batch, the first call's compilation included.
    """

    text: str
    token_ids: list[int]
    stats: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """A step of a stream: a piece of text, never part of a character, and the token ids drawn since the last event.

    A piece may be empty while a character is incomplete. The last event carries the whole reply.
    """

    text: str
    token_ids: list[int]
    reply: Reply | None = None


class Omni:
    """A loaded model; build one with `omni_jax.load`.

    params: nested dict of arrays, {"thinker": ...}. graph: the Thinker's declaration, static under jit.
    """

    def __init__(self, params: dict, config: OmniConfig, processor: Processor):
        self.params = params
        self.config = config
        self.processor = processor
        self.graph = declare(Thinker, config.thinker)

    @property
    def thinker(self) -> Thinker:
        """The Thinker as an NNX module with its parameters in place."""
        return bind(self.graph, self.params["thinker"])

    def prepare(
        self,
        messages: Messages | list[Messages],
        *,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
        padding: str = "right",
    ) -> Batch:
        """Messages to the arrays that the model takes, NumPy only; see `Processor.prepare`."""
        return self.processor.prepare(
            messages, use_audio_in_video=use_audio_in_video, tools=tools, fps=fps, padding=padding
        )

    def logits(self, batch: Batch) -> jax.Array:
        """Teacher-forced Thinker logits of a prepared batch, float32 [B, T, V]; rows at padding mean nothing."""
        T = batch.token_ids.shape[1]
        batch = pad_length(batch, bucket(T))
        params = self.params["thinker"]
        media = encode_media(params, batch, self.graph)
        first = np.argmax(batch.mask, axis=1).astype(np.int32)
        return forward(params, batch.token_ids, batch.position_ids, first, media, graph=self.graph)[:, :T]

    def generate(
        self,
        messages: Messages | list[Messages],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
    ) -> Reply | list[Reply]:
        """Answer one conversation, or each of a list of them (rows may hold different media).

        temperature 0 is greedy. seed: one for all rows or one per row; a row's reply depends on its own seed and
        prompt alone. stop_ids: token ids that end a reply, by default the end of the assistant's turn. fps: frames
        sampled per second of video. Raises InputError for messages, media or settings that cannot be used, and for a
        prompt that does not fit the context together with its reply.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        batch = self.prepare(messages, use_audio_in_video=use_audio_in_video, tools=tools, fps=fps)
        session = self._session(batch, sampling, max_new_tokens, seed, stop_ids)
        for _ in session.chunks():
            pass
        replies = self._replies(session)
        return replies[0] if is_conversation(messages) else replies

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
    ) -> Iterator[Event]:
        """Answer one conversation piece by piece; arguments as in `generate`.

        The pieces join to the text that `generate` returns, and the last event carries the whole reply. Bad input is
        raised at the call, not at the first event.
        """
        if not is_conversation(messages):
            raise InputError("stream takes one conversation (a list of messages); use generate for a batch")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        batch = self.prepare(messages, use_audio_in_video=use_audio_in_video, tools=tools, fps=fps)
        return self._events(self._session(batch, sampling, max_new_tokens, seed, stop_ids))

    def _session(
        self,
        batch: Batch,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | Sequence[int],
        stop_ids: Sequence[int] | None,
    ) -> Session:
        stop_ids = [self.config.im_end_token_id] if stop_ids is None else stop_ids
        text = self.config.thinker.text
        params = self.params["thinker"]
        return Session(params, self.graph, text, batch, sampling, max_new_tokens, seed, stop_ids)

    def _events(self, session: Session) -> Iterator[Event]:
        text = TextStream(self.processor.tokenizer)
        for (new,) in session.chunks(STREAM_STEPS):
            yield Event(text.add(new), new)
        yield Event(text.finish(), [], self._replies(session)[0])

    def _replies(self, session: Session) -> list[Reply]:
        replies = []
        for length, ids, stopped in zip(session.lengths, session.rows, session.stopped, strict=True):
            stats = {
                "prompt_tokens": int(length),
                "new_tokens": len(ids),
                "finish_reason": "stop" if stopped else "length",
                "prefill_seconds": session.prefill_seconds,
                "decode_seconds": session.decode_seconds,
            }
            replies.append(Reply(self.processor.tokenizer.decode(ids), ids, stats))
        return replies


def load(path: str | Path, *, dtype: str | None = None) -> Omni:
    """Load a converted checkpoint directory onto the first device.

    dtype: "float32" or "bfloat16"; by default as `default_dtype` says. Raises CheckpointError for a directory that is
    not a complete converted checkpoint or whose arrays are not those of its config.json, before reading any of them.
    """
    path = Path(path)
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype {dtype!r}; choose from {list(DTYPES)}")
    config = checkpoint.read_config(path)
    processor = Processor.from_dir(path, config)
    checkpoint.check_shapes(path, {"thinker": declare(Thinker, config.thinker).shapes})
    params = checkpoint.restore(path, parts=("thinker",), dtype=dtype or default_dtype())
    return Omni(params, config, processor)


def default_dtype() -> str | None:
    """The type that weights are held in unless told: None, as stored, on accelerators, and float32 on CPU.

    There, half-precision experts would be widened again at every step.
    """
    return "float32" if sharding.platform() == "cpu" else None
