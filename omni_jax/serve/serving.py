"""What a server does with a request that was read: from `Asked` to the pieces of its answer.

Asked -> media (bytes) -> workers (batch) -> Prompts, one per reply -> Service -> events, timed -> answered
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event
from omni_jax.inputs.batch import Batch
from omni_jax.serve.answered import DONE, ChatStream, Choice, Heading, Usage, completion_body, sse
from omni_jax.serve.asked import Asked, Defaults
from omni_jax.serve.asked_audio import AskedSpeech
from omni_jax.serve.engine import Service
from omni_jax.serve.errors import naming, told
from omni_jax.serve.media import Media
from omni_jax.serve.metrics import Metrics
from omni_jax.serve.tickets import each
from omni_jax.serve.workers import Workers

# Characters of a conversation that is prepared in the server's own process, and of one that does not leave its thread.
SHORT_CHARACTERS, QUICK_CHARACTERS = 20_000, 1_000
_TEXT_KEYS = {"type", "text"}  # of a part that is text
TRANSCRIBE = "Transcribe the {language}audio into text."


# The number of a prompt, and an event of its reply.
Numbered = tuple[int, Event]


@dataclass(frozen=True, eq=False)
class Serving:
    """The parts of a server.

    model: its name. created: when it started, in seconds since 1970. instruction: what a request for a transcript asks
    the model, with "{language}" where the name of a language and a space go.
    """

    model: str
    created: int
    service: Service
    workers: Workers
    media: Media
    defaults: Defaults
    metrics: Metrics
    instruction: str = TRANSCRIBE

    async def completion(self, asked: Asked) -> dict[str, Any]:
        """A whole chat completion."""
        start, choices, usage = time.monotonic(), self._choices(asked), None
        with naming(asked.names), self.service.places(asked.n):
            batch = await self.prepare(asked)
            usage = Usage.of_prompt(batch)
            async with aclosing(self._together(self._prompts(asked, batch), start)) as events:
                async for index, event in each(events):
                    choices[index].take(event)
                    usage.add(event, event.reply)
        if not asked.speech:
            return completion_body(Heading(self.model), choices, usage)
        # Compressing a long sound takes a while.
        return await asyncio.to_thread(completion_body, Heading(self.model), choices, usage)

    async def chunks(self, asked: Asked) -> AsyncGenerator[str, None]:
        """A chat completion as events of a stream; an error after the first one is an event too."""
        start = time.monotonic()
        with naming(asked.names), self.service.places(asked.n):
            batch = await self.prepare(asked)
            stream = ChatStream(asked, Heading(self.model), self._choices(asked), Usage.of_prompt(batch))
            begun = False
            try:
                async with aclosing(self._together(self._prompts(asked, batch), start)) as events:
                    async for together in events:
                        # Sending a piece costs more than what is in it.
                        chunks = "" if begun else stream.begin()
                        chunks += "".join(stream.add(index, event) for index, event in together)
                        chunks += stream.end() if stream.over else ""
                        begun = True
                        if chunks:
                            yield chunks
            except Exception as error:
                if not begun:
                    raise
                yield sse(told(error).body()) + DONE

    async def events(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """The events of the one reply to a request."""
        start = time.monotonic()
        with naming(asked.names), self.service.places(1):
            batch = await self.prepare(asked)
            async with aclosing(self._together(self._prompts(asked, batch), start)) as events:
                async for _, event in each(events):
                    yield event

    async def aloud(self, asked: AskedSpeech) -> AsyncGenerator[Event, None]:
        """The events of a text that is read aloud."""
        start, settings, seed = time.monotonic(), asked.settings, asked.settings.seed
        assert isinstance(seed, int)
        with naming(asked.names), self.service.places(1):
            said = await asyncio.to_thread(self.service.running.said, asked.text, settings.voice, seed)
            watch = self.metrics.watch(len(said.words.spoken), start)
            async with aclosing(self.service.read_aloud(said)) as events:
                async for event in events:
                    watch.event(event)
                    yield event

    async def prepare(self, asked: Asked) -> Batch:
        """The prepared conversation of a request."""
        preparation = asked.settings.preparation
        options = {
            "use_audio_in_video": preparation.use_audio_in_video,
            "fps": preparation.fps,
            "media": preparation.media,
            "enable_thinking": preparation.thinking,
        }
        messages = await self.media.resolve(asked.messages)
        conversation = {"messages": messages, "tools": asked.tools}
        with naming({}, "messages"):
            # Text does not wait until media of others are decoded; and what takes a millisecond needs no thread.
            characters, prepare = text_characters(messages, asked.tools), self.service.running.omni.processor.prepare
            if characters is None or characters > SHORT_CHARACTERS:
                return await self.workers.prepare(conversation, options)
            if characters > QUICK_CHARACTERS:
                return await asyncio.to_thread(prepare, conversation, **options)
            return prepare(conversation, **options)

    def _choices(self, asked: Asked) -> list[Choice]:
        tokenizer = self.service.running.omni.processor.tokenizer
        return [Choice(index, asked, tokenizer) for index in range(asked.n)]

    def _prompts(self, asked: Asked, batch: Batch) -> list[Prompt]:
        """A prompt for each reply; reply i of seed s is that of seed s + i."""
        settings, ending = asked.settings, asked.settings.ending
        limit = ending.max_new_tokens
        if not asked.has_limit:
            context = self.service.running.omni.config.thinker.text.max_position_embeddings
            limit = max(min(limit, context - int(batch.mask.sum())), 1)
        assert isinstance(settings.seed, int)
        first = Prompt(
            batch,
            settings.seed,
            limit,
            speech=asked.speech,
            sampling=settings.sampling,
            stop=ending.stop if ending.stop is not None else (),
            stop_ids=ending.stop_ids,
            voice=settings.voice if asked.speech else None,
        )
        return [replace(first, seed=settings.seed + i) for i in range(asked.n)]

    async def _together(self, prompts: Sequence[Prompt], start: float) -> AsyncGenerator[list[Numbered], None]:
        """The events of the replies to prompts, those that have come by now, each with the number of its prompt.

        start: when the request was read, of `time.monotonic`.
        """
        if len(prompts) == 1:
            watch = self.metrics.watch(int(prompts[0].batch.mask.sum()), start)
            async with aclosing(self.service.answer_together(prompts[0])) as events:
                async for together in events:
                    for event in together:
                        watch.event(event)
                    yield [(0, event) for event in together]
            return
        arrived: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def follow(index: int, prompt: Prompt) -> None:
            watch = self.metrics.watch(int(prompt.batch.mask.sum()), start)
            try:
                async with aclosing(self.service.answer(prompt)) as events:
                    async for event in events:
                        watch.event(event)
                        arrived.put_nowait((index, event))
                arrived.put_nowait((index, None))
            except Exception as error:
                arrived.put_nowait((index, error))

        tasks = [asyncio.create_task(follow(i, prompt)) for i, prompt in enumerate(prompts)]
        try:
            left = len(tasks)
            while left:
                found = [await arrived.get()]
                while not arrived.empty():
                    found.append(arrived.get_nowait())
                left -= sum(event is None for _, event in found)
                errors = [event for _, event in found if isinstance(event, Exception)]
                if events := [(index, event) for index, event in found if isinstance(event, Event)]:
                    yield events
                if errors:
                    raise errors[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def text_characters(messages: Sequence[Any], tools: Sequence[Any] | None = None) -> int | None:
    """The characters of messages of text alone and of all that belongs to them; None if they hold anything else."""
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [
        part["text"] if isinstance(part, dict) and part.keys() == _TEXT_KEYS and part["type"] == "text" else part
        for part in parts
    ]
    return _characters([messages, tools]) if all(isinstance(text, str) for text in texts) else None


def _characters(value: Any) -> int:
    """The characters of a JSON value, at least one for each value in it."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(len(name) + _characters(one) for name, one in value.items())
        case list() | tuple():
            return sum(map(_characters, value))
    return 1
