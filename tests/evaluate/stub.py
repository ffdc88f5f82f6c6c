"""A model that computes nothing: it says what its prompts are and records what it is asked for."""

from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decode.prompt import Prompt
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.processor import Processor
from omni_jax.omni import Reply


class StubOmni:
    """Stands for an `Omni` where a run asks for replies. The letters of a prompt are its tokens, and its reply.

    asked: the keyword arguments of each call by method. processor: reads the media of prompts, which are ignored
    without. poison: texts whose prompts cannot be computed.
    """

    def __init__(self, config: OmniConfig, processor: Processor | None = None, poison: Container[str] = ()):
        self.config, self.processor, self.poison = config, processor, poison
        self.params: dict = {}
        self.mesh_reason = ""
        self.asked: dict[str, list[dict]] = {"prepare": [], "generate_many": []}
        self.prompts: list[Prompt] = []

    def prepare(self, messages: list, **settings: Any) -> Batch:
        self.asked["prepare"].append(dict(settings))
        if self.processor is not None:
            thinking = settings.pop("thinking", None)
            self.processor.prepare(messages, enable_thinking=thinking, **settings)
        return Batch.of_text([[ord(letter) for letter in _text(messages)]])

    def generate_many(self, prompts: Iterator[Prompt | None], *, slots: int, **settings: Any) -> Iterator:
        self.asked["generate_many"].append({"slots": slots, **settings})
        return self._answers(prompts, slots)

    def _answers(self, prompts: Iterator[Prompt | None], slots: int) -> Iterator[tuple[int, Reply]]:
        running, number, more = [], 0, True
        while running or more:
            while more and len(running) < slots:
                prompt = next(prompts, False)
                if prompt is None:
                    break
                more = bool(prompt)
                if prompt:
                    running.append((number, prompt))
                    self.prompts.append(prompt)
                    number += 1
            texts = ["".join(map(chr, prompt.batch.token_ids[0])) for _, prompt in running]
            if any(text in self.poison for text in texts):
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory at 0x7f00aa00")
            if running:
                sound = {"audio_seconds": 1.0} if self.asked["generate_many"][-1].get("speech") else {}
                stats = {"seconds": 0.0, "share_seconds": 1.0, "compiled": 0, **sound}
                yield running.pop(0)[0], _reply(texts[0], stats)


def _text(messages: list) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def _reply(text: str, stats: dict) -> Reply:
    stats = {"new_tokens": len(text), "finish_reason": "stop", **stats}
    return Reply(text, [ord(letter) for letter in text], stats, np.zeros(240, np.float32))
