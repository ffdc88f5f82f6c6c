"""What the command line shows of replies: JSON on stdout, and a summary on stderr."""

import json
import sys
from pathlib import Path
from typing import Any

from omni_jax.decode.reply import Event, Logprobs, Reply
from omni_jax.distributed import is_primary
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Omni


def report_mesh(omni: Omni) -> None:
    """Print which mesh was chosen automatically, if one was, and why."""
    if omni.mesh_reason and is_primary():
        print(f"mesh {omni.mesh_reason}", file=sys.stderr)


def json_text(values: Any) -> str:
    """JSON that standard output can encode: where that is not UTF-8, letters beyond ASCII are escaped."""
    return json.dumps(values, ensure_ascii=sys.stdout.encoding.lower().replace("-", "") != "utf8")


def reply_values(made: Reply | Event, tokenizer: Tokenizer) -> dict[str, Any]:
    """A reply or an event as JSON shows it; of sound, only the length."""
    values: dict[str, Any] = {"text": made.text, "token_ids": made.token_ids}
    if made.reasoning:
        values["reasoning"] = made.reasoning
    if made.logprobs is not None:
        values["logprobs"] = _logprobs(made.token_ids, made.logprobs, tokenizer)
    if isinstance(made, Reply):
        return values | {"stats": made.stats}
    seconds = 0.0 if made.audio is None else len(made.audio) / SAMPLES_PER_SECOND
    return values | {"audio_seconds": seconds, "reply": reply_values(made.reply, tokenizer) if made.reply else None}


def _logprobs(token_ids: list[int], logprobs: Logprobs, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each token its text, id and log-probability, and those of the likeliest tokens at its place."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token_id], skip_special=False), "token_id": token_id, "logprob": logprob}

    tops = zip(logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)
    likeliest = [[one(*pair) for pair in zip(*top, strict=True)] for top in tops]
    own = map(one, token_ids, logprobs.token.tolist())
    return [token | {"top_logprobs": top} for token, top in zip(own, likeliest, strict=True)]


def summary(speak: Path | None, stats: dict[str, Any]) -> str:
    """What became of a reply with these statistics, for stderr. speak: the file with its sound, if any."""
    seconds = stats["prefill_seconds"] + stats["decode_seconds"]
    text = f"{stats['prompt_tokens']} prompt tokens, {stats['new_tokens']} new, {seconds:.2f} s with compilation"
    stop = stats.get("stop_string")
    text += f"; ended by {stats['finish_reason']}" + (f" at {stop!r}" if stop is not None else "")
    if "rounds" in stats:
        text += f"\n{stats['rounds']} rounds of drafting, {stats['tokens_per_round']:.2f} tokens each"
    if speak is None:
        return text
    seconds = stats["talker_seconds"] + stats["vocoder_seconds"]
    ended = "the limit of frames" if stats["speech_finish_reason"] == "length" else "itself"
    text += f"\n{speak}: {stats['audio_seconds']:.2f} s of speech, {seconds:.2f} s to make"
    return f"{text}; ended by {ended}"
