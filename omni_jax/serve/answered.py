"""Replies as OpenAI's objects: chat completions, whole and in chunks, and what counts their tokens.

In a stream, text is `delta.content` and sound is `delta.audio` with `data` in base64 and, as `transcript`, the text
since the last piece of sound; each chunk states its `modality`, which clients of other servers of this model look at.
Deliberate difference from OpenAI: where both modalities are asked for, the text comes as content too.
"""

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omni_jax.decode.reply import Event, Logprobs, Reply
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.serve import sounds
from omni_jax.serve.asked import Asked
from omni_jax.serve.calls import Call, CallSplitter

DONE = "data: [DONE]\n\n"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def sse(value: dict[str, Any], event: str | None = None) -> str:
    """An event of a stream that holds an object."""
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {_JSON.encode(value)}\n\n"


@dataclass(frozen=True)
class Heading:
    """What all objects of one answer share. id: "chatcmpl-...". model: its name. created: seconds since 1970."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str) -> dict[str, Any]:
        """The fields of an object of a kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass
class Usage:
    """Tokens of a prompt and of the replies to it.

    cached: of the prompt, did not run again. frames: of speech. drafted, accepted: tokens of drafts, where replies were
    drafted.
    """

    prompt: int
    images: int = 0
    audio: int = 0
    completion: int = 0
    cached: int = 0
    frames: int = 0
    drafted: int | None = None
    accepted: int = 0

    @classmethod
    def of_prompt(cls, batch: Batch) -> "Usage":
        """That of a prepared prompt before its replies."""
        images, audio = (int((index >= 0).sum()) for index in (batch.visual_index, batch.audio_index))
        return cls(int(batch.mask.sum()), images, audio)

    def add(self, event: Event, reply: Reply | None) -> None:
        """Count what an event brings; the counts of drafts come with the reply."""
        self.completion += len(event.token_ids)
        if reply is None:
            return
        self.frames += reply.stats.get("frames", 0)
        self.cached = max(self.cached, reply.stats.get("cached_tokens", 0))
        if "rounds" in reply.stats:
            self.drafted = (self.drafted or 0) + reply.stats["drafted"]
            self.accepted += sum(reply.stats["round_tokens"]) - reply.stats["rounds"]

    def body(self) -> dict[str, Any]:
        """OpenAI's object, in which frames of speech are tokens of the reply too."""
        reply: dict[str, int] = {"text_tokens": self.completion, "audio_tokens": self.frames}
        if self.drafted is not None:
            reply["accepted_prediction_tokens"] = self.accepted
            reply["rejected_prediction_tokens"] = max(self.drafted - self.accepted, 0)
        prompt = {"cached_tokens": self.cached, "image_tokens": self.images, "audio_tokens": self.audio}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion + self.frames,
            "total_tokens": self.prompt + self.completion + self.frames,
            "prompt_tokens_details": {**prompt, "text_tokens": self.prompt - self.images - self.audio},
            "completion_tokens_details": reply,
        }


class Choice:
    """One reply as it comes: what its events add to the message, or to a stream.

    text, reasoning, calls, logprobs: all so far. finish: why it ended, None before that.
    """

    def __init__(self, index: int, asked: Asked, tokenizer: Tokenizer):
        self.index, self.asked, self._tokenizer = index, asked, tokenizer
        self.text, self.reasoning, self.calls = "", "", list[Call]()
        self.logprobs: list[dict[str, Any]] = []
        self.finish: str | None = None
        self.audio_id = f"audio-{secrets.token_hex(12)}"
        self.reply: Reply | None = None
        self._splitter = CallSplitter() if asked.tools else None
        self._ends = asked.settings.ending.stop_ids or ()
        self._sound = sounds.pieces(asked.sound) if asked.speech and asked.stream else None
        self._unsaid = ""

    def take(self, event: Event) -> tuple[str, list[Call], list[dict[str, Any]]]:
        """Take in an event: its text, its calls, and the log-probabilities of its tokens."""
        text, calls, last = event.text, list[Call](), event.reply is not None
        if self._splitter is not None:
            text, calls = self._splitter.add(text, last)
        logprobs = logprobs_body(event.token_ids, event.logprobs, self._ends, self._tokenizer)
        self.text, self.reasoning = self.text + text, self.reasoning + event.reasoning
        self.calls += calls
        self.logprobs += logprobs
        if event.reply is not None:
            self.reply = event.reply
            reason = event.reply.stats["finish_reason"]
            self.finish = "tool_calls" if self.calls and reason == "stop" else reason
        return text, calls, logprobs

    def deltas(self, event: Event) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """What an event adds to a stream: the modality of each delta, the delta, and its log-probabilities."""
        first = len(self.calls)
        text, calls, logprobs = self.take(event)
        found: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = []
        delta: dict[str, Any] = {"reasoning_content": event.reasoning} if event.reasoning else {}
        if text and self.asked.text:
            delta["content"] = text
        if calls:
            numbered = enumerate(calls, start=first)
            delta["tool_calls"] = [{"index": i, **call_body(call, self.audio_id, i)} for i, call in numbered]
        if delta or logprobs:
            found.append(("text", delta, logprobs))
        if self._sound is not None:
            self._unsaid += text
            data = b"" if event.audio is None else self._sound.add(event.audio)
            data += self._sound.end() if event.reply is not None else b""
            if data or event.reply is not None and self._unsaid:
                found.append(("audio", {"audio": self._piece(data)}, []))
        return found

    def _piece(self, data: bytes) -> dict[str, Any]:
        unsaid, self._unsaid = self._unsaid, ""
        return {"id": self.audio_id, "data": base64.b64encode(data).decode(), "transcript": unsaid}

    def body(self, created: int) -> dict[str, Any]:
        """The whole reply as a choice of a chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text if self.asked.text else None}
        message["refusal"] = None
        if self.reply is not None and self.reply.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [call_body(call, self.audio_id, i) for i, call in enumerate(self.calls)]
        if self.asked.speech and self.reply is not None:
            wave = np.zeros(0, np.float32) if self.reply.audio is None else self.reply.audio
            data = base64.b64encode(sounds.whole(wave, self.asked.sound)).decode()
            message["audio"] = {"id": self.audio_id, "data": data, "transcript": self.text, "expires_at": created}
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(self.logprobs),
            "finish_reason": self.finish,
            **self._speech_end(),
        }

    def _logprobs(self, content: list[dict[str, Any]]) -> dict[str, Any] | None:
        wanted = self.asked.settings.sampling.logprobs is not None
        return {"content": content, "refusal": None} if wanted else None

    def chunk(self, delta: dict[str, Any], logprobs: list[dict[str, Any]], finish: str | None = None) -> dict[str, Any]:
        """A delta as the choice of a chunk."""
        stated = self._logprobs(logprobs) if logprobs else None
        ended = {} if finish is None else self._speech_end()
        return {"index": self.index, "delta": delta, "logprobs": stated, "finish_reason": finish, **ended}

    def _speech_end(self) -> dict[str, str]:
        """What a choice says of the end of its speech: "length" if it was cut at the most frames, else "stop"."""
        stats = {} if self.reply is None else self.reply.stats
        return {name: stats[name] for name in ("speech_finish_reason",) if name in stats}


def call_body(call: Call, reply_id: str, number: int) -> dict[str, Any]:
    """A call as OpenAI's object, whose id follows from the reply's."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call-{reply_id[6:]}-{number}", "type": "function", "function": function}


def logprobs_body(
    token_ids: Sequence[int], logprobs: Logprobs | None, ends: Sequence[int], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Log-probabilities of tokens as OpenAI has them, without those that end a reply."""
    if logprobs is None:
        return []

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token, skip_special=False)
        return {"token": data.decode("utf-8", "replace"), "logprob": float(logprob), "bytes": list(data)}

    found = []
    rows = zip(token_ids, logprobs.token.tolist(), logprobs.top_ids, logprobs.top, strict=True)
    for token, logprob, ids, top in rows:
        if token not in ends:
            others = [one(*pair) for pair in zip(ids.tolist(), top.tolist(), strict=True)]
            found.append({**one(token, logprob), "top_logprobs": others})
    return found


class ChatStream:
    """The chunks of a streamed chat completion, as text of events."""

    def __init__(self, asked: Asked, heading: Heading, choices: Sequence[Choice], usage: Usage):
        self.asked, self.heading, self.choices, self.usage = asked, heading, choices, usage

    def begin(self) -> str:
        """The chunks before any reply has begun."""
        role = {"role": "assistant", "content": "" if self.asked.text else None}
        return "".join(self._chunk("text", [choice.chunk(role, [])]) for choice in self.choices)

    def add(self, index: int, event: Event) -> str:
        """The chunks of an event of reply number `index`."""
        choice = self.choices[index]
        deltas = choice.deltas(event)
        self.usage.add(event, event.reply)
        chunks = [self._chunk(kind, [choice.chunk(delta, logprobs)]) for kind, delta, logprobs in deltas]
        if event.reply is not None:
            kind = "audio" if self.asked.speech else "text"
            counted = self.over and not self.asked.include_usage
            chunks.append(self._chunk(kind, [choice.chunk({}, [], choice.finish)], counted))
        return "".join(chunks)

    @property
    def over(self) -> bool:
        """Whether all replies have ended."""
        return all(choice.finish for choice in self.choices)

    def end(self) -> str:
        """The chunk that counts tokens, if it is wanted, and the end mark."""
        return (self._chunk(None, [], counted=True) if self.asked.include_usage else "") + DONE

    def _chunk(self, modality: str | None, choices: list[dict[str, Any]], counted: bool = False) -> str:
        chunk = self.heading.of("chat.completion.chunk") | {"choices": choices}
        if modality is not None:
            chunk["modality"] = modality
        if counted or self.asked.continuous_usage:
            chunk["usage"] = self.usage.body()
        elif self.asked.include_usage:
            chunk["usage"] = None
        return sse(chunk)


def completion_body(heading: Heading, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
    """A whole chat completion."""
    bodies = [choice.body(heading.created) for choice in choices]
    return heading.of("chat.completion") | {"choices": bodies, "usage": usage.body()}


def model_body(model: str, created: int, voices: Sequence[str]) -> dict[str, Any]:
    """The one model; voices: of its speakers, none if it does not speak."""
    return {"id": model, "object": "model", "created": created, "owned_by": "omni-jax", "voices": list(voices)}
