"""Whole conversations as token ids, in which each reply of the assistant is told apart from its prompt.

    conversation -> render -> prompts | replies -> encode each -> token ids, and whose reply each token is

A reply is what the model would have generated: what follows the generation prompt (`<|im_start|>assistant` and a line
end, and what the template adds to them to open or to skip the reasoning) up to and with `<|im_end|>`. It is encoded
apart from its prompt, as at inference, where the prompt's tokens are fixed before the reply begins. Control tokens in
the text of messages are hidden while replies are looked for, so that none can be forged.

Source: HF `apply_chat_template(return_assistant_tokens_mask=True)`, for any template. Deliberate differences:
- An empty block of reasoning that only the template wrote is left out unless `enable_thinking` asks for it: the model
  is not prompted with one, and would learn to write it.
- A reply whose reasoning the template drops, as most do before the last question, is not marked as a reply: the model
  would learn to answer without reasoning.
"""

from dataclasses import dataclass
from typing import Any

from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.messages import REASONING, Conversation
from omni_jax.inputs.prompt import rendered
from omni_jax.inputs.template import ChatTemplate
from omni_jax.inputs.tokenizer import Tokenizer

HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
OPENED, THOUGHT = "<think>", "</think>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
NO_REPLY = -1


@dataclass(frozen=True, eq=False)
class ReplyEncoder:
    """Encodes conversations with one template.

    opening: what a generation prompt writes after `HEADER`. enable_thinking: passed to the template if not None.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    enable_thinking: bool | None
    opening: str

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer, enable_thinking: bool | None = None) -> "ReplyEncoder":
        """The encoder of a template; CheckpointError for one that does not open replies as Qwen3-Omni's do."""
        question = [{"role": "user", "content": "?"}]
        before, prompt = (
            template.render(question, None, add_generation_prompt=added, enable_thinking=enable_thinking)
            for added in (False, True)
        )
        added = prompt.removeprefix(before)
        if not added.startswith(HEADER):
            raise CheckpointError(
                f"the chat template opens replies with {added[:80]!r}, not with {HEADER!r}; take the chat template of "
                "the published checkpoint"
            )
        return cls(template, tokenizer, enable_thinking, added.removeprefix(HEADER))

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """The ids of a conversation with one placeholder per medium, and the message that each token is a reply of.

        Messages are counted from 0; `NO_REPLY` marks tokens of prompts. Raises InputError for a conversation that the
        template refuses, or of which it does not write every reply.
        """
        text, shield = rendered(
            conversation,
            self.template,
            self.tokenizer,
            add_generation_prompt=False,
            enable_thinking=self.enable_thinking,
        )
        first, *turns = text.split(HEADER)
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(turns) != len(answers):
            raise InputError(
                f"the chat template writes {len(turns)} replies for {len(answers)} messages of the assistant; "
                "join messages that follow each other"
            )
        pieces = [(first, NO_REPLY)]
        for turn, number in zip(turns, answers, strict=True):
            pieces += self._pieces(turn, number, conversation.messages[number])
        ids, owners = [], []
        for piece, owner in pieces:
            made = shield.encode(piece)
            ids += made
            owners += [owner] * len(made)
        return ids, owners

    def _pieces(self, turn: str, number: int, message: dict[str, Any]) -> list[tuple[str, int]]:
        """The prompt, the reply and what follows of a turn, which begins after its header."""
        reply, end, rest = turn.partition(END)
        prompt, reasons = HEADER, _reasons(message)
        if reply.startswith(self.opening):
            prompt, reply = HEADER + self.opening, reply.removeprefix(self.opening)
        if not reasons and self.enable_thinking is None and OPENED not in self.opening:
            reply = reply.removeprefix(EMPTY_THOUGHT)
        dropped = reasons and THOUGHT not in reply
        return [(prompt, NO_REPLY), (reply + end, NO_REPLY if dropped else number), (rest, NO_REPLY)]


def _reasons(message: dict[str, Any]) -> bool:
    """Whether a message states the assistant's reasoning, apart or in its text."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return bool(message.get(REASONING[0], "").strip()) or any(THOUGHT in text for text in texts)
