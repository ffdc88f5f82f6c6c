"""The `omni-jax` command: generate, stream, inspect and evaluate.

Answers go to stdout, everything else to stderr. With `--json` stdout holds JSON only: one object, or for `stream` one
per line. Exit status: 0 done; 1 a bug, with its traceback; 2 wrong usage; 3 bad input or checkpoint, too little memory,
or an answer that could not be written; 4 evaluated, but not all rows could be scored; 130 interrupted; 141 whoever read
the answer left before its end, as `head` may.
"""

if __name__ == "__main__":
    # Here rather than below the imports, which take time: an interrupt may fall into them too.
    from omni_jax.process import enter

    enter("omni-jax", "omni_jax.cli")

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tqdm import tqdm

from omni_jax import process
from omni_jax.decode.limits import copies_of
from omni_jax.decode.reply import Logprobs
from omni_jax.decode.sampling import Sampling
from omni_jax.distributed import START_SECONDS, Machines, is_primary
from omni_jax.errors import InputError, OmniError
from omni_jax.evaluate.command import Evaluate, evaluate
from omni_jax.evaluate.report import is_whole
from omni_jax.files import STDIN, read_json, reason_of, user_path
from omni_jax.inputs.messages import with_base
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inspection import Inspect, inspect
from omni_jax.loading import default_dtype, load_lazily
from omni_jax.media_flags import MediaFlags
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Event, Omni, Reply
from omni_jax.sharding import platform
from omni_jax.sound import check_sound_file, write_sound
from omni_jax.weights.drafters import Drafter, check_drafter, load_drafter
from omni_jax.weights.locate import locate
from omni_jax.weights.model import model_config


@dataclass(frozen=True)
class Ask(Machines):
    """What to ask, and how to draw the answer."""

    model: Path
    """Model id, Hugging Face directory or converted checkpoint (python -m convert SRC DST)."""
    text: str | None = None
    """The question."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A picture; repeat the flag for more, in order."""
    audio: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A sound file; repeat the flag for more, in order."""
    video: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A video; repeat the flag for more, in order."""
    system: str | None = None
    """System prompt."""
    messages: Path | None = None
    """JSON file with a whole conversation, in place of the question and its media; - is standard input."""
    use_audio_in_video: bool = False
    """Listen to the sound tracks of the videos, in step with their frames."""
    fps: float | None = None
    """Frames sampled per second of video."""
    media: tyro.conf.OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    thinking: bool | None = None
    """Let a model that can do both think first, or not; by default as its template has it."""
    max_new_tokens: int = 1024
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends the answer, which does not show it; repeat the flag for more."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    """With --json: log-probabilities of the answer's tokens, and of this many alternatives to each."""
    speak: Path | None = None
    """Say the answer too, into this .wav or .flac file."""
    speaker: str = "ethan"
    """Whose voice; `inspect` lists the checkpoint's."""
    speech_temperature: float = 0.9
    """0 is greedy."""
    speech_top_k: int = 50
    speech_top_p: float = 1.0
    speech_repetition_penalty: float = 1.05
    max_frames: int = 4096
    """Longest speech, in frames of 80 ms."""
    drafter: Path | None = None
    """Directory or id of a DFlash or EAGLE-3 drafter for this model: the same answer in fewer steps."""
    draft_tokens: int | Literal["auto"] | None = None
    """Tokens that it drafts a round; by default as many as it was trained for, with auto as many as prove fastest."""
    draft_tree: tuple[int, int] | None = None
    """Levels and candidates of the tree that an EAGLE-3 drafter proposes; its authors take 7 10."""
    draft_sampling: bool = False
    """Draw the drafts too: more stand at high temperatures, and the answer is another one, drawn alike."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Weights' type; by default the checkpoint's own, on CPU float32."""
    json: bool = False
    """Machine-readable output."""


@dataclass(frozen=True)
class Generate(Ask):
    """Answer a question about text, pictures, sound and video."""

    n: int | None = None
    """Several answers; answer i is that of --seed plus i."""


@dataclass(frozen=True)
class Stream(Ask):
    """Answer like `generate`, printing the text as it is written."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Stream, tyro.conf.subcommand("stream")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


C = TypeVar("C", bound=Generate | Stream | Inspect | Evaluate)


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's own); SystemExit with its status unless all went well."""
    command = tyro.cli(
        Command,
        prog="omni-jax",
        description=__doc__,
        args=args,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        _run(_with_user_paths(command))
    except OmniError as error:
        print(f"omni-jax: {error}", file=sys.stderr)
        sys.exit(process.BAD_INPUT)
    except Exception as error:
        if not process.lacks_memory(error):
            raise
        remedy = "lower --max-new-tokens, send smaller media, take --dtype bfloat16, or spread the model with --mesh"
        print(f"omni-jax: there is too little memory ({reason_of(error)}); {remedy}", file=sys.stderr)
        sys.exit(process.BAD_INPUT)


def _run(command: Command) -> None:
    if isinstance(command, Inspect):
        return inspect(command)
    if command.distributed:
        _join(command)
    else:
        command.join()
    platform()  # Before anything is read: are there such devices?
    command = replace(command, model=locate(command.model))
    if isinstance(command, Evaluate):
        _evaluate(command)
    else:
        _answer(command)


def _with_user_paths(command: C) -> C:
    """The command with `~` expanded in its paths, wherever the shell did not do so, as in --model=~/model."""

    def expanded(value: Any, flag: str) -> Any:
        if isinstance(value, tuple):
            return tuple(expanded(one, flag) for one in value)
        return user_path(value, flag) if isinstance(value, Path) else value

    names = [field.name for field in fields(command)]
    return replace(command, **{name: expanded(getattr(command, name), f"--{name}") for name in names})


def _join(command: Machines) -> None:
    """Join the others; only the first answers, and what libraries write to standard output goes to stderr."""
    answers = os.dup(sys.stdout.fileno())
    # Joining already connects the processes, of which XLA tells on standard output.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(f"joining the other processes, for which this one waits {START_SECONDS} s at most", file=sys.stderr)
    command.join()
    if not is_primary():
        os.dup2(os.open(os.devnull, os.O_WRONLY), answers)
    process.answer_on(answers)


def _answer(ask: Ask) -> None:
    messages = _messages(ask)
    if ask.speak is not None:
        check_sound_file(ask.speak)
    settings = _settings(ask, _drafter(ask))
    # Several processes answer one question together.
    mesh = "auto" if ask.mesh is None and ask.distributed else ask.mesh

    def tell(omni: Omni) -> None:
        """By now nothing is wrong with the request: the weights are read, which may take minutes."""
        print(f"loading {ask.model}", file=sys.stderr)
        _tell_mesh(omni)

    parts = None if ask.speak else ("thinker",)
    omni = load_lazily(ask.model, mesh=mesh, dtype=ask.dtype, parts=parts, before_reading=tell)
    if isinstance(ask, Generate) and ask.n is not None:
        return _show_all(ask, omni.generate(messages, n=ask.n, **settings), omni.processor.tokenizer)
    events = omni.stream(messages, **settings)
    reply = _follow(ask, events, omni.processor.tokenizer)
    if not isinstance(ask, Stream):
        print(_json(_plain(reply, omni.processor.tokenizer)) if ask.json else reply.text)
    elif not ask.json:
        print()
    if ask.speak is not None and reply.audio is not None and is_primary():
        # An interrupt here leaves no half of a file.
        with process.finishing():
            write_sound(ask.speak, reply.audio, SAMPLES_PER_SECOND)
    print(_summary(ask, reply.stats), file=sys.stderr)


def _settings(ask: Ask, drafter: Drafter | None) -> dict[str, Any]:
    """How the flags want the answer to be made, for `Omni.stream` and `generate`."""
    if ask.logprobs is not None and not ask.json:
        raise InputError("--logprobs are shown in JSON only; add --json")
    if isinstance(ask, Generate) and ask.n is not None:
        copies_of(ask.n, Sampling(ask.temperature))
        if ask.speak is not None:
            raise InputError("--speak says one answer; leave out --n")
    names = (
        *("max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "logprobs"),
        *("use_audio_in_video", "fps", "thinking", "speaker", "speech_temperature", "speech_top_k", "speech_top_p"),
        *("speech_repetition_penalty", "max_frames", "draft_tokens", "draft_tree", "draft_sampling"),
    )
    made = {"speech": ask.speak is not None, "drafter": drafter, "media": ask.media.options()}
    return {name: getattr(ask, name) for name in names} | made


def _show_all(ask: Ask, replies: Any, tokenizer: Tokenizer) -> None:
    """Show several replies: as one JSON list, or below each other."""
    if ask.json:
        print(_json([_plain(reply, tokenizer) for reply in replies]))
    else:
        print("\n---\n".join(reply.text for reply in replies))
    for reply in replies:
        print(_summary(ask, reply.stats), file=sys.stderr)


def _tell_mesh(omni: Omni) -> None:
    """Say which mesh was chosen, if it was, and why."""
    if omni.mesh_reason and is_primary():
        print(f"mesh {omni.mesh_reason}", file=sys.stderr)


def _drafter(ask: Ask) -> Drafter | None:
    """The drafter that the flags name, made for the model."""
    if ask.drafter is None:
        if ask.draft_tokens is not None or ask.draft_tree is not None or ask.draft_sampling:
            raise InputError("--draft-tokens, --draft-tree and --draft-sampling need a --drafter")
        return None
    drafter = load_drafter(ask.drafter, dtype=ask.dtype or default_dtype())
    check_drafter(drafter, model_config(ask.model))
    return drafter


def _follow(ask: Ask, events: Iterator[Event], tokenizer: Tokenizer) -> Reply:
    """Show a reply as it is made, text on stdout if it is streamed and progress on stderr, and return it."""
    live, reply = isinstance(ask, Stream), None
    bar = partial(tqdm, file=sys.stderr, leave=False, disable=live or not is_primary() or None)
    spoken = partial(bar, desc="speech", unit="s", bar_format="{desc}: {n:.1f} s of audio in {elapsed}")
    with (
        bar(total=ask.max_new_tokens, unit="token") as written,
        spoken(disable=live or not is_primary() or ask.speak is None or None) as said,
    ):
        for event in events:
            written.update(len(event.token_ids))
            said.update(0 if event.audio is None else len(event.audio) / SAMPLES_PER_SECOND)
            if live and ask.json:
                print(_json(_plain(event, tokenizer)), flush=True)
            elif live:
                print(event.text, end="", flush=True)
            if process.unread() and ask.speak is None and not ask.distributed:
                sys.exit()
            reply = event.reply
    assert reply is not None
    return reply


def _json(values: Any) -> str:
    """JSON in the letters that standard output knows; where it is not UTF-8, others are escaped."""
    return json.dumps(values, ensure_ascii=sys.stdout.encoding.lower().replace("-", "") != "utf8")


def _plain(made: Reply | Event, tokenizer: Tokenizer) -> dict[str, Any]:
    """What JSON shows of a reply or an event: sound by its length only."""
    values: dict[str, Any] = {"text": made.text, "token_ids": made.token_ids}
    if made.logprobs is not None:
        values["logprobs"] = _plain_logprobs(made.token_ids, made.logprobs, tokenizer)
    if isinstance(made, Reply):
        return values | {"stats": made.stats}
    seconds = 0.0 if made.audio is None else len(made.audio) / SAMPLES_PER_SECOND
    return values | {"audio_seconds": seconds, "reply": _plain(made.reply, tokenizer) if made.reply else None}


def _plain_logprobs(token_ids: list[int], logprobs: Logprobs, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each token its text, id and log-probability, and those of the likeliest in its place."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token_id], skip_special=False), "token_id": token_id, "logprob": logprob}

    tops = zip(logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)
    likeliest = [[one(*pair) for pair in zip(*top, strict=True)] for top in tops]
    own = map(one, token_ids, logprobs.token.tolist())
    return [token | {"top_logprobs": top} for token, top in zip(own, likeliest, strict=True)]


def _summary(ask: Ask, stats: dict[str, Any]) -> str:
    seconds = stats["prefill_seconds"] + stats["decode_seconds"]
    text = f"{stats['prompt_tokens']} prompt tokens, {stats['new_tokens']} new, {seconds:.2f} s with compilation"
    stop = stats.get("stop_string")
    text += f"; ended by {stats['finish_reason']}" + (f" at {stop!r}" if stop is not None else "")
    if "rounds" in stats:
        text += f"\n{stats['rounds']} rounds of drafting, {stats['tokens_per_round']:.2f} tokens each"
    if ask.speak is None:
        return text
    seconds = stats["talker_seconds"] + stats["vocoder_seconds"]
    ended = "the limit of frames" if stats["speech_finish_reason"] == "length" else "itself"
    return f"{text}\n{ask.speak}: {stats['audio_seconds']:.2f} s of speech, {seconds:.2f} s to make; ended by {ended}"


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


def _evaluate(command: Evaluate) -> None:
    import omni_jax

    def load(parts: tuple[str, ...] | None) -> Omni:
        print(f"loading {command.model}", file=sys.stderr)
        omni = omni_jax.load(command.model, mesh=command.mesh, dtype=command.dtype, parts=parts)
        _tell_mesh(omni)
        return omni

    summary = evaluate(command, load)
    if is_primary():
        print(json.dumps(summary) if command.json else (command.output / "report.md").read_text("utf-8"))
    if not is_whole(summary):
        sys.exit(process.UNSCORED)
