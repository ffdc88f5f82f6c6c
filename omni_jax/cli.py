"""The `omni-jax` command: generate, stream and inspect.

Answers go to stdout, everything else to stderr. Exit status: 0 done, 2 wrong usage, 3 bad input or checkpoint. With
`--json` stdout holds JSON only: one object, or for `stream` one per line.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from omni_jax import checkpoint
from omni_jax.config import OmniConfig
from omni_jax.drafter import load_drafter
from omni_jax.errors import InputError, OmniError
from omni_jax.inputs.speech import speaker_ids
from omni_jax.loading import default_dtype, described
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.models.param import declare
from omni_jax.omni import PARTS, Event, Reply
from omni_jax.ops.cache import slots_for
from omni_jax.placement import parse_parts
from omni_jax.sharding import check_mesh, mesh_name
from omni_jax.sound import check_sound_file, write_sound


@dataclass(frozen=True)
class Ask:
    """What to ask, and how to draw the answer."""

    model: Path
    """Converted checkpoint directory (python -m convert SRC DST)."""
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
    """JSON file with a whole conversation, in place of the question and its media."""
    use_audio_in_video: bool = False
    """Listen to the sound tracks of the videos, in step with their frames."""
    fps: float | None = None
    """Frames sampled per second of video."""
    max_new_tokens: int = 1024
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
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
    """Directory of a DFlash or EAGLE-3 drafter for this model: the same answer in fewer steps."""
    draft_tokens: int | Literal["auto"] | None = None
    """Tokens that it drafts a round; by default as many as it was trained for, with auto as many as prove fastest."""
    draft_tree: tuple[int, int] | None = None
    """Levels and candidates of the tree that an EAGLE-3 drafter proposes; its authors take 7 10."""
    draft_sampling: bool = False
    """Draw the drafts too: more stand at high temperatures, and the answer is another one, drawn alike."""
    mesh: str | None = None
    """Devices: expert=4,data=2 or auto, or by part thinker:expert=4;talker:expert=2; by default the first alone."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Weights' type; by default the checkpoint's own, on CPU float32."""
    json: bool = False
    """Machine-readable output."""


@dataclass(frozen=True)
class Generate(Ask):
    """Answer a question about text, pictures, sound and video."""


@dataclass(frozen=True)
class Stream(Ask):
    """Answer like `generate`, printing the text as it is written."""


@dataclass(frozen=True)
class Inspect:
    """Tell what a checkpoint holds and what memory it needs, from its headers alone."""

    model: tyro.conf.Positional[Path]
    """Converted checkpoint, or a Hugging Face directory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type to load the weights in; by default as loading on this machine would."""
    context: int = 4096
    """Tokens per conversation."""
    batch: int = 1
    """Conversations at once."""
    mesh: str | None = None
    """Tell what each device of such a mesh would hold; the devices need not be here."""
    json: bool = False
    """Machine-readable output."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Stream, tyro.conf.subcommand("stream")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's own) and exit with its status."""
    command = tyro.cli(
        Command,
        prog="omni-jax",
        description=__doc__,
        args=args,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        if isinstance(command, Inspect):
            _inspect(command)
        else:
            _answer(command)
    except OmniError as error:
        print(f"omni-jax: {error}", file=sys.stderr)
        sys.exit(3)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def _answer(ask: Ask) -> None:
    messages = _messages(ask)
    if ask.speak is not None:
        # Before the weights are read, which may take minutes.
        check_sound_file(ask.speak)
        speaker_ids(ask.speaker, 1, checkpoint.read_config(ask.model))
    import omni_jax

    print(f"loading {ask.model}", file=sys.stderr)
    omni = omni_jax.load(ask.model, mesh=ask.mesh, dtype=ask.dtype, parts=None if ask.speak else ("thinker",))
    if omni.mesh_reason:
        print(f"mesh {omni.mesh_reason}", file=sys.stderr)
    drafter = None
    if ask.drafter is not None:
        drafter = load_drafter(ask.drafter, dtype=ask.dtype or default_dtype())
    elif ask.draft_tokens is not None or ask.draft_tree is not None or ask.draft_sampling:
        raise InputError("--draft-tokens, --draft-tree and --draft-sampling need a --drafter")
    events = omni.stream(
        messages,
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        min_p=ask.min_p,
        repetition_penalty=ask.repetition_penalty,
        seed=ask.seed,
        use_audio_in_video=ask.use_audio_in_video,
        fps=ask.fps,
        speech=ask.speak is not None,
        speaker=ask.speaker,
        speech_temperature=ask.speech_temperature,
        speech_top_k=ask.speech_top_k,
        speech_top_p=ask.speech_top_p,
        speech_repetition_penalty=ask.speech_repetition_penalty,
        max_frames=ask.max_frames,
        drafter=drafter,
        draft_tokens=ask.draft_tokens,
        draft_tree=ask.draft_tree,
        draft_sampling=ask.draft_sampling,
    )
    reply = _follow(ask, events)
    if not isinstance(ask, Stream):
        print(json.dumps(_plain(reply), ensure_ascii=False) if ask.json else reply.text)
    elif not ask.json:
        print()
    if ask.speak is not None and reply.audio is not None:
        write_sound(ask.speak, reply.audio, SAMPLES_PER_SECOND)
    print(_summary(ask, reply.stats), file=sys.stderr)


def _follow(ask: Ask, events: Iterator[Event]) -> Reply:
    """Show a reply as it is made, text on stdout if it is streamed and progress on stderr, and return it."""
    live, reply = isinstance(ask, Stream), None
    bar = partial(tqdm, file=sys.stderr, leave=False, disable=live or None)
    spoken = partial(bar, desc="speech", unit="s", bar_format="{desc}: {n:.1f} s of audio in {elapsed}")
    with (
        bar(total=ask.max_new_tokens, unit="token") as written,
        spoken(disable=live or ask.speak is None or None) as said,
    ):
        for event in events:
            written.update(len(event.token_ids))
            said.update(0 if event.audio is None else len(event.audio) / SAMPLES_PER_SECOND)
            if live and ask.json:
                print(json.dumps(_plain(event), ensure_ascii=False), flush=True)
            elif live:
                print(event.text, end="", flush=True)
            reply = event.reply
    assert reply is not None
    return reply


def _plain(made: Reply | Event) -> dict[str, Any]:
    """What JSON shows of a reply or an event: sound by its length only."""
    values = {"text": made.text, "token_ids": made.token_ids}
    if isinstance(made, Reply):
        return values | {"stats": made.stats}
    seconds = 0.0 if made.audio is None else len(made.audio) / SAMPLES_PER_SECOND
    return values | {"audio_seconds": seconds, "reply": _plain(made.reply) if made.reply else None}


def _summary(ask: Ask, stats: dict[str, Any]) -> str:
    seconds = stats["prefill_seconds"] + stats["decode_seconds"]
    text = f"{stats['prompt_tokens']} prompt tokens, {stats['new_tokens']} new, {seconds:.2f} s with compilation"
    text += f"; ended by {stats['finish_reason']}"
    if "rounds" in stats:
        text += f"\n{stats['rounds']} rounds of drafting, {stats['tokens_per_round']:.2f} tokens each"
    if ask.speak is None:
        return text
    seconds = stats["talker_seconds"] + stats["vocoder_seconds"]
    ended = "the limit of frames" if stats["speech_finish_reason"] == "length" else "itself"
    return f"{text}\n{ask.speak}: {stats['audio_seconds']:.2f} s of speech, {seconds:.2f} s to make; ended by {ended}"


def _messages(ask: Ask) -> list[dict[str, Any]]:
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


def _read_messages(path: Path) -> list[dict[str, Any]]:
    try:
        messages = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{path}: not a list of messages, each with a role and content")
    return messages


def _inspect(command: Inspect) -> None:
    if (command.model / checkpoint.MANIFEST).is_file():
        config = checkpoint.read_config(command.model)
        leaves = checkpoint.read_manifest(command.model).leaves
        arrays = [(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()]
        kind = "converted checkpoint"
    else:
        from convert.plan import plan
        from convert.source import open_checkpoint

        made = plan(open_checkpoint(command.model))
        config = made.config
        arrays = [(leaf.path, leaf.shape, dtype.name) for leaf, dtype in made.leaves]
        kind = "Hugging Face checkpoint"
    report = {"checkpoint": str(command.model), "kind": kind, **summarise(config, arrays, command)}
    if command.mesh is not None:
        report |= _on_devices(config, {path: dtype for path, _, dtype in arrays}, command.mesh, command)
    print(json.dumps(report) if command.json else _table(report))


def summarise(config: OmniConfig, arrays: list[tuple[str, tuple[int, ...], str]], command: Inspect) -> dict[str, Any]:
    """Parameters and bytes of each part, and the bytes of weights and cache that a run needs.

    arrays: path, shape and dtype of every array. The cache is the Thinker's, in the weights' type.
    """
    loaded = command.dtype or default_dtype()
    parts: dict[str, dict[str, int]] = {}
    for path, shape, dtype in arrays:
        part = parts.setdefault(path.split("/")[0], {"arrays": 0, "parameters": 0, "bytes": 0})
        part["arrays"] += 1
        part["parameters"] += prod(shape)
        part["bytes"] += prod(shape) * jnp.dtype(loaded or dtype).itemsize
    text = config.thinker.text
    dtype = jnp.dtype(loaded or arrays[0][2])
    per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize
    cache = per_token * slots_for(min(command.context, text.max_position_embeddings)) * command.batch
    return {
        "stored_dtype": arrays[0][2],
        "dtype": dtype.name,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "layers": text.num_layers,
        "experts": text.num_experts,
        "experts_per_token": text.experts_per_token,
        "max_context": text.max_position_embeddings,
        "speech": config.talker is not None,
        "speakers": [name for name, _ in config.talker.speakers] if config.talker else [],
        "cache_bytes_per_token": per_token,
        "cache_bytes": cache,
        "thinker_bytes": parts["thinker"]["bytes"] + cache,
    }


def _on_devices(config: OmniConfig, types: dict[str, str], mesh: str, command: Inspect) -> dict[str, Any]:
    """What each device of a mesh would hold: bytes of weights by part, and of the Thinker's cache."""
    present = [part for part in PARTS if getattr(config, part) is not None]
    asked = parse_parts(mesh, present)
    loaded, held, cache = command.dtype or default_dtype(), {}, 0
    for name in present:
        part = described(name, declare(PARTS[name], getattr(config, name)), config, types, loaded)
        sizes = asked.get("") or asked.get(name) or asked["talker"]
        check_mesh({name: part.declared}, sizes)
        held[name] = {"mesh": mesh_name(sizes), "bytes": part.weight_bytes(sizes)}
        if name == "thinker":
            cache = part.cache_bytes(sizes, command.batch, command.context)
    return {"mesh": mesh, "device_bytes": held, "device_cache_bytes": cache}


def _table(report: dict[str, Any]) -> str:
    """The report as text for people."""
    lines = [f"{report['checkpoint']}: {report['kind']} in {report['stored_dtype']}, sizes in {report['dtype']}", ""]
    lines += [f"{'part':<10}{'arrays':>8}{'parameters':>18}{'size':>12}"]
    rows = [*report["parts"].items(), ("all", {"arrays": sum(p["arrays"] for p in report["parts"].values()), **report})]
    for name, part in rows:
        lines.append(f"{name:<10}{part['arrays']:>8}{part['parameters']:>18,}{_size(part['bytes']):>12}")
    lines += [
        "",
        f"text model: {report['layers']} layers, {report['experts']} experts of which {report['experts_per_token']} "
        f"work on a token, context {report['max_context']:,}",
        f"speakers: {', '.join(report['speakers']) or 'none (text only)'}",
        f"cache: {_size(report['cache_bytes_per_token'])} a token, {_size(report['cache_bytes'])} for this context",
        f"to answer in text: {_size(report['thinker_bytes'])} of weights and cache, beside working memory",
    ]
    for name, held in report.get("device_bytes", {}).items():
        more = f", and {_size(report['device_cache_bytes'])} of cache" if name == "thinker" else ""
        lines.append(f"on each device of {held['mesh']}: {_size(held['bytes'])} of the {name}'s weights{more}")
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes for people: 1,500,000 -> '1.50 MB'."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    main()
