"""What a reply thinks and what it answers, in whole texts, in pieces cut anywhere, and in the model's own replies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.decode import reasoning
from omni_jax.decode.generation import GenerationPlan
from omni_jax.decode.limits import Limits
from omni_jax.decode.reasoning import ReasoningSplitter, ends_inside_reasoning, split_reasoning
from omni_jax.decode.sampling import Sampling
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.tokenizer import Tokenizer

# Text, whether the prompt has opened the reasoning, and the answer and reasoning that it is.
CASES = [
    ("An answer.", False, "An answer.", None),
    ("\n An answer.\n", False, "\n An answer.\n", None),
    ("", False, "", None),
    ("<thin", False, "<thin", None),
    ("<think>\nTwo and two.\n</think>\n\nFour.\n", False, "Four.\n", "Two and two."),
    ("\n <think>Two and two.</think>Four.", False, "Four.", "Two and two."),
    ("Two and two.\n</think>\n\nFour.", True, "Four.", "Two and two."),
    ("<think>\n\n</think>\n\nFour.", False, "Four.", ""),
    ("", True, "", ""),
    # It was cut short while it thought, also within the mark.
    ("<think>\nTwo\n\nand\n", False, "", "Two\n\nand"),
    ("Two and two.\n</thi", True, "", "Two and two.\n</thi"),
    ("Two and two.</think>\n", True, "", "Two and two."),
    # The first end counts; marks elsewhere are text.
    ("<think>a < b</think>c</think>", False, "c</think>", "a < b"),
    ("Write <think>x</think>.", False, "Write <think>x</think>.", None),
    ("x</think>y", False, "x</think>y", None),
]


@pytest.mark.parametrize("text, begins_inside, answer, thought", CASES)
def test_a_text_is_split_into_answer_and_reasoning(
    text: str, begins_inside: bool, answer: str, thought: str | None
) -> None:
    assert split_reasoning(text, begins_inside) == (answer, thought)


@given(text=st.text("<thinkabc/>\n ", max_size=40) | st.sampled_from([case[0] for case in CASES]), data=st.data())
def test_pieces_join_to_what_the_whole_text_gives(text: str, data: st.DataObject) -> None:
    begins_inside = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    splitter = ReasoningSplitter(begins_inside)
    bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
    pieces = [splitter.add(text[start:end]) for start, end in bounds]
    pieces.append(splitter.add("", last=True))
    answer, thought = split_reasoning(text, begins_inside)
    assert "".join(piece.text for piece in pieces) == answer
    assert "".join(piece.reasoning for piece in pieces) == (thought or "")


def test_reasoning_is_not_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter(begins_inside=True)
    assert splitter.add("\nTwo and ").reasoning == "Two and "
    assert splitter.add("two.\n<").reasoning == "two."
    assert splitter.add("/b").reasoning == "\n</b"
    assert splitter.add("</think>\nFour").text == "Four"


@pytest.mark.parametrize(
    "prompt, inside",
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_a_prompt_that_ends_with_an_open_mark_begins_inside(
    prompt: str, inside: bool, checkpoints: Callable[[str], Path]
) -> None:
    tokenizer = Tokenizer(checkpoints("tiny"))
    ids = tokenizer.encode(prompt)
    assert ends_inside_reasoning(ids, tokenizer) is inside
    assert ends_inside_reasoning(np.array(ids, np.int32), tokenizer) is inside


def test_each_request_of_a_batch_knows_whether_it_begins_inside(omnis: Callable[[str], Any]) -> None:
    omni = omnis("tiny")
    tokenizer = omni.processor.tokenizer
    prompts = [tokenizer.encode("<|im_start|>assistant\n" + more) for more in ("<think>\n", "")]
    batch = Batch.of_text([prompt[-min(map(len, prompts)) :] for prompt in prompts])
    plan = GenerationPlan(Sampling(), Limits(4), None, None)
    requests = plan.together(batch, [0, 1, 2, 3], omni.config, tokenizer).requests
    assert [request.begins_inside_reasoning for request in requests] == [True, True, False, False]


@pytest.mark.slow
def test_a_reply_and_its_stream_keep_reasoning_apart(
    omnis: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes no marks, so those looked for are pieces of what it does write."""
    omni, messages = omnis("tiny"), [{"role": "user", "content": "What do you see?"}]
    plain = omni.generate(messages, max_new_tokens=24)
    assert plain.reasoning is None
    opened, closed = plain.text[:2], plain.text[9:12]
    assert closed not in plain.text[2:9]
    monkeypatch.setattr(reasoning, "OPEN", opened)
    monkeypatch.setattr(reasoning, "CLOSE", closed)
    thought, answer = plain.text[2:9], plain.text[12:]

    def is_split(reply: Any) -> bool:
        return (reply.text, reply.reasoning, reply.token_ids) == (answer, thought, plain.token_ids)

    assert is_split(omni.generate(messages, max_new_tokens=24))
    assert is_split(omni.generate([messages, messages], max_new_tokens=24)[1])
    assert all(is_split(reply) for _, reply in omni.generate_many([messages] * 3, slots=2, max_new_tokens=24))
    events = list(omni.stream(messages, max_new_tokens=24))
    assert "".join(event.text for event in events) == answer
    assert "".join(event.reasoning for event in events) == thought
    assert is_split(events[-1].reply)
    short = omni.generate(messages, max_new_tokens=24, stop=plain.text[5:8])
    assert (short.text, short.reasoning) == ("", plain.text[2:5]), "a stop string ends a reply in its reasoning too"
