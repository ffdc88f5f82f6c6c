"""`omni-jax generate` and `stream`: one question from its flags to the answer that is shown.

Everything that can be checked is checked before the weights are read.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, UseAppendAction

from omni_jax import process
from omni_jax.distributed import is_primary
from omni_jax.errors import InputError
from omni_jax.files import STDIN, read_json
from omni_jax.flags import (
    DeviceFlags,
    EndingFlags,
    MediaFlags,
    PreparationFlags,
    SamplingFlags,
    VoiceFlags,
    keywords_of,
)
from omni_jax.inputs.messages import with_base
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.loading import default_dtype, load_lazily
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Event, Omni, Reply
from omni_jax.printing import json_text, reply_values, report_mesh, summary
from omni_jax.settings import Drafting
from omni_jax.sound import check_sound_file, write_sound
from omni_jax.weights.drafters import Drafter, load_drafter


@dataclass(frozen=True)
class DraftingFlags(Drafting):
    """How replies are drafted: the same answer in fewer steps."""

    drafter: Path | None = None
    """Directory of a DFlash or EAGLE-3 drafter for this model; nano/dflash and nano/eagle3 are for nano."""


@dataclass(frozen=True)
class OutputFlags:
    """What becomes of the answer."""

    speak: Path | None = None
    """Say the answer too, into this .wav or .flac file."""
    json: bool = False
    """Machine-readable output."""
    logprobs: int | None = None
    """With --json: log-probabilities of the answer's tokens, and of this many alternatives to each."""


@dataclass(frozen=True)
class Ask:
    """What to ask, and how to draw the answer."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    adapter: Path | None = None
    """Directory of a LoRA adapter for this model, as PEFT saves it; it is merged into the weights."""
    text: str | None = None
    """The question."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture; repeat the flag for more, in order."""
    audio: UseAppendAction[tuple[Path, ...]] = ()
    """A sound file; repeat the flag for more, in order."""
    video: UseAppendAction[tuple[Path, ...]] = ()
    """A video; repeat the flag for more, in order."""
    system: str | None = None
    """System prompt."""
    messages: Path | None = None
    """JSON file with a whole conversation, in place of the question and its media; - is standard input."""
    prompt: OmitArgPrefixes[PreparationFlags] = field(default_factory=PreparationFlags)
    media: OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    reply: OmitArgPrefixes[EndingFlags] = field(default_factory=EndingFlags)
    sampling: OmitArgPrefixes[SamplingFlags] = field(default_factory=SamplingFlags)
    speech: OmitArgPrefixes[VoiceFlags] = field(default_factory=VoiceFlags)
    drafting: OmitArgPrefixes[DraftingFlags] = field(default_factory=DraftingFlags)
    devices: OmitArgPrefixes[DeviceFlags] = field(default_factory=DeviceFlags)
    output: OmitArgPrefixes[OutputFlags] = field(default_factory=OutputFlags)


@dataclass(frozen=True)
class Generate(Ask):
    """Answer a question about text, pictures, sound and video."""

    n: int | None = None
    """Several answers; answer i is that of --seed plus i."""


@dataclass(frozen=True)
class Stream(Ask):
    """Answer like `generate`, printing the text as it is written."""


def answer(ask: Ask) -> None:
    """Answer a question and show the answer; InputError for flags that cannot be used."""
    messages = _messages(ask)
    if ask.output.speak is not None:
        check_sound_file(ask.output.speak)
    settings = _settings(ask, _drafter(ask))
    # Several processes answer one question together.
    mesh = "auto" if ask.devices.mesh is None and ask.devices.distributed else ask.devices.mesh

    def before_reading(omni: Omni) -> None:
        """Nothing is wrong with the request: now the weights are read, which may take minutes."""
        print(f"loading {ask.model}", file=sys.stderr)
        report_mesh(omni)

    parts = None if ask.output.speak else ("thinker",)
    omni = load_lazily(
        ask.model,
        mesh=mesh,
        dtype=ask.devices.dtype,
        parts=parts,
        adapter=ask.adapter,
        quantize=ask.devices.quantize,
        before_reading=before_reading,
    )
    if isinstance(ask, Generate) and ask.n is not None:
        return _show_all(ask, omni.generate(messages, n=ask.n, **settings), omni.processor.tokenizer)
    events = omni.stream(messages, **settings)
    reply = _follow(ask, events, omni.processor.tokenizer)
    if not isinstance(ask, Stream):
        print(json_text(reply_values(reply, omni.processor.tokenizer)) if ask.output.json else reply.text)
    elif not ask.output.json:
        print()
    if ask.output.speak is not None and reply.audio is not None and is_primary():
        # An interrupt here leaves no half of a file.
        with process.finishing():
            write_sound(ask.output.speak, reply.audio, SAMPLES_PER_SECOND)
    print(summary(ask.output.speak, reply.stats), file=sys.stderr)


def _settings(ask: Ask, drafter: Drafter | None) -> dict[str, Any]:
    """How the flags want the answer to be made, for `Omni.stream` and `generate`."""
    speak, logprobs = ask.output.speak, ask.output.logprobs
    if logprobs is not None and not ask.output.json:
        raise InputError("--logprobs are shown in JSON only; add --json")
    if isinstance(ask, Generate) and ask.n is not None and speak is not None:
        raise InputError("--speak says one answer; leave out --n")
    made = keywords_of(ask.media, ask.prompt, ask.reply, ask.sampling, ask.speech, ask.drafting)
    return made | {"logprobs": logprobs, "speech": speak is not None, "drafter": drafter}


def _drafter(ask: Ask) -> Drafter | None:
    """The drafter that the flags name."""
    path, dtype = ask.drafting.drafter, ask.devices.dtype or default_dtype()
    return None if path is None else load_drafter(path, dtype=dtype)


def _messages(ask: Ask) -> Any:
    """The conversation that the flags describe."""
    parts = [
        {"type": kind, kind: str(path)}
        for kind, paths in (("image", ask.image), ("audio", ask.audio), ("video", ask.video))
        for path in paths
    ]
    if ask.messages is not None:
        if parts or ask.text or ask.system:
            raise InputError("--messages holds the whole conversation; leave out --text, --system and media flags")
        return _read_messages(ask.messages)
    if ask.text is not None:
        parts.append({"type": "text", "text": ask.text})
    if not parts:
        raise InputError("nothing to answer: give --text, --image, --audio, --video or --messages")
    system = [{"role": "system", "content": ask.system}] if ask.system is not None else []
    return [*system, {"role": "user", "content": parts}]


def _read_messages(path: Path) -> Any:
    """The messages of a file, a list or {"messages": a list, "tools": ...}; "-" is standard input.

    Paths of media are relative to the file.
    """
    messages = read_json(path, error=InputError, remedy="give a JSON file, or - for standard input")
    if not isinstance(messages, list) and not (isinstance(messages, dict) and "messages" in messages):
        raise InputError(f"{path}: not a list of messages, each with a role and content, nor an object that holds one")
    return messages if str(path) == STDIN else with_base(messages, path.parent)


def _follow(ask: Ask, events: Iterator[Event], tokenizer: Tokenizer) -> Reply:
    """Show a reply as it is made, text on stdout if it is streamed and progress on stderr, and return it."""
    live, thinks, reply = isinstance(ask, Stream), False, None
    bar = partial(tqdm, file=sys.stderr, leave=False, disable=live or not is_primary() or None)
    spoken = partial(bar, desc="speech", unit="s", bar_format="{desc}: {n:.1f} s of audio in {elapsed}")
    with (
        bar(total=ask.reply.max_new_tokens, unit="token") as written,
        spoken(disable=live or not is_primary() or ask.output.speak is None or None) as said,
    ):
        for event in events:
            written.update(len(event.token_ids))
            said.update(0 if event.audio is None else len(event.audio) / SAMPLES_PER_SECOND)
            if live and ask.output.json:
                print(json_text(reply_values(event, tokenizer)), flush=True)
            elif live:
                # The answer begins on a line of its own, where a terminal shows both.
                after = "\n" if thinks and event.text else ""
                print(event.reasoning, end=after, file=sys.stderr, flush=True)
                print(event.text, end="", flush=True)
                thinks = not event.text and (thinks or bool(event.reasoning))
            if process.unread() and ask.output.speak is None and not ask.devices.distributed:
                sys.exit()
            reply = event.reply
    assert reply is not None
    return reply


def _show_all(ask: Ask, replies: Any, tokenizer: Tokenizer) -> None:
    """Show several replies: as one JSON list, or below each other."""
    if ask.output.json:
        print(json_text([reply_values(reply, tokenizer) for reply in replies]))
    else:
        print("\n---\n".join(reply.text for reply in replies))
    for reply in replies:
        print(summary(ask.output.speak, reply.stats), file=sys.stderr)
