"""What is reported of a run: figures, a table, a plot. What was not measured is absent."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.compare import Row
from scripts.bench.serving_client import Answer, text_tokens

PERCENTILES = (50, 90, 99)
# Percentiles over requests; the key is that of `measured`.
LATENCIES: tuple[Row, ...] = (
    ("first token, ms", "first_token_seconds", 1e3, ".1f"),
    ("between tokens, ms", "between_tokens_seconds", 1e3, ".2f"),
    ("between pieces of text, ms", "between_pieces_seconds", 1e3, ".1f"),
    ("whole reply, s", "reply_seconds", 1.0, ".3f"),
    ("first audio, ms", "first_audio_seconds", 1e3, ".1f"),
    ("real-time factor of speech", "real_time_factor", 1.0, ".3f"),
    ("late speech, ms", "late_seconds", 1e3, ".1f"),
    ("tokens", "tokens", 1.0, ".0f"),
    ("accepted length", "accepted_length", 1.0, ".2f"),
)
TOTALS: tuple[Row, ...] = (
    ("duration, s", "seconds", 1.0, ".2f"),
    ("requests/s", "requests_per_second", 1.0, ".3f"),
    ("tokens", "tokens", 1.0, ".0f"),
    ("tokens/s", "tokens_per_second", 1.0, ".1f"),
    ("prompt tokens", "prompt_tokens", 1.0, ".0f"),
    ("of them kept from earlier", "cached_tokens", 1.0, ".0f"),
    ("accepted length", "accepted_length", 1.0, ".3f"),
    ("speech, s", "audio_seconds", 1.0, ".2f"),
    ("speech, s per s", "audio_per_second", 1.0, ".3f"),
    ("underruns", "underruns", 1.0, ".0f"),
    ("replies with underruns", "replies_with_underruns", 1.0, ".0f"),
    ("programs compiled meanwhile", "compiled", 1.0, ".0f"),
    ("generate_many compiled", "generate_compiled", 1.0, ".0f"),
    ("generate_many, tokens/s", "generate_tokens_per_second", 1.0, ".1f"),
    ("server / generate_many", "of_generate", 1.0, ".3f"),
)
DISTRIBUTIONS = ("first_token_seconds", "between_tokens_seconds", "first_audio_seconds", "reply_seconds")
BINS = 60  # of the plot of tokens over time


def measured(answer: Answer) -> dict[str, list[float]]:
    """What was measured of a reply that did not fail: one value of each, several between pieces, none if unknown."""
    found: dict[str, list[float]] = {"reply_seconds": [answer.ended - answer.sent]}
    if answer.texts:
        found["first_token_seconds"] = [answer.texts[0] - answer.sent]
        found["between_pieces_seconds"] = [later - earlier for earlier, later in pairwise(answer.texts)]
    if answer.sounds:
        length = sum(seconds for _, seconds in answer.sounds)
        found["first_audio_seconds"], found["audio_seconds"] = [answer.sounds[0][0] - answer.sent], [length]
        if length:
            found["real_time_factor"] = [(answer.sounds[-1][0] - answer.sent) / length]
        underruns, late = playback(answer.sounds)
        found["underruns"], found["late_seconds"] = [underruns], [late]
    if answer.usage is not None:
        found |= _counted(answer, answer.usage)
    return {name: values for name, values in found.items() if values}


def _counted(answer: Answer, usage: dict[str, Any]) -> dict[str, list[float]]:
    """What follows from the server's counts of tokens."""
    tokens, found = text_tokens(usage), {}
    found["tokens"], found["prompt_tokens"] = [tokens], [usage["prompt_tokens"]]
    steps = [(now, more) for (_, fewer), (now, more) in pairwise([(0.0, 0), *answer.counts]) if more > fewer]
    if len(steps) > 1:
        (first, fewer), (last, more) = steps[0], steps[-1]
        found["between_tokens_seconds"] = [(last - first) / (more - fewer)]
    elif len(answer.texts) > 1 and tokens > 1:
        found["between_tokens_seconds"] = [(answer.texts[-1] - answer.texts[0]) / (tokens - 1)]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    found["cached_tokens"] = [] if cached is None else [cached]
    rounds = rounds_of(usage)
    found["rounds"], found["accepted_length"] = ([rounds], [(tokens - 1) / rounds]) if rounds else ([], [])
    return found


def rounds_of(usage: dict[str, Any]) -> int | None:
    """The number of draft rounds; None for a reply without drafts.

    The prompt gives the first token, and each round after it the accepted tokens and one of the model's own.
    """
    details = usage.get("completion_tokens_details") or {}
    accepted, rejected = (details.get(f"{name}_prediction_tokens") or 0 for name in ("accepted", "rejected"))
    rounds = text_tokens(usage) - 1 - accepted
    return rounds if accepted + rejected > 0 and rounds > 0 else None


def playback(sounds: Sequence[tuple[float, float]]) -> tuple[int, float]:
    """A player that starts with the first piece: how often it runs out of sound, and for how many seconds in all.

    sounds: when each piece came, and its length in seconds.
    """
    underruns, late, until = 0, 0.0, sounds[0][0]
    for now, seconds in sounds:
        if now > until:
            underruns, late, until = underruns + 1, late + now - until, now
        until += seconds
    return underruns, late


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Totals and percentiles of a run or of one kind of its requests; rates are those over its own duration."""
    good = [answer for answer in answers if answer.failure is None]
    failed = Counter(answer.failure for answer in answers if answer.failure is not None)
    details = {answer.failure: answer.detail for answer in reversed(answers) if answer.failure is not None}
    found: dict[str, Any] = {"requests": len(answers), "completed": len(good), "failed": dict(failed.most_common())}
    found["details"] = {reason: details[reason] for reason in found["failed"] if details[reason]}
    values = [measured(answer) for answer in good]
    pooled = {name: [v for one in values for v in one.get(name, ())] for name in {n for one in values for n in one}}
    found["latencies"] = {
        key: {**{str(p): float(np.percentile(pooled[key], p)) for p in PERCENTILES}, "values": len(pooled[key])}
        for _, key, _, _ in LATENCIES
        if key in pooled
    }
    if good:
        seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
        found |= _totals(pooled, len(good), seconds)
    return found


def _totals(pooled: dict[str, list[float]], completed: int, seconds: float) -> dict[str, float]:
    found = {"seconds": seconds, "requests_per_second": completed / seconds}
    for name in ("tokens", "prompt_tokens", "cached_tokens", "audio_seconds", "underruns"):
        if name in pooled:
            found[name] = sum(pooled[name])
    if "tokens" in found:
        found["tokens_per_second"] = found["tokens"] / seconds
    if "audio_seconds" in found:
        found["audio_per_second"] = found["audio_seconds"] / seconds
        found["replies_with_underruns"] = sum(count > 0 for count in pooled["underruns"])
    if "rounds" in pooled:
        drafted = [length * rounds for length, rounds in zip(pooled["accepted_length"], pooled["rounds"], strict=True)]
        found["accepted_length"] = sum(drafted) / sum(pooled["rounds"])
    return found


def request_figures(answer: Answer) -> dict[str, Any]:
    """One request as the JSON shows it."""
    row = {name: values[0] for name, values in measured(answer).items() if name != "between_pieces_seconds"}
    row = {} if answer.failure is not None else row | {"finish": answer.finish}
    told = {} if answer.failure is None else {"failure": answer.failure, "detail": answer.detail}
    return {"number": answer.number, "kind": answer.kind, "sent": answer.sent, "ended": answer.ended, **row, **told}


def table(found: dict[str, Any]) -> str:
    """The figures of a run as text: its totals, then percentiles, those of each kind too if there are several."""
    total = found["all"]
    lines = [f"{'completed':<30}{total['completed']:>10} of {total['requests']}"]
    lines += [f"{label:<30}{total[key] * scale:>10{form}}" for label, key, scale, form in TOTALS if key in total]
    for reason, count in total["failed"].items():
        detail = total["details"].get(reason)
        lines.append(f"failed: {count} by {reason}" + (f" ({detail})" if detail else ""))
    for name in ["all"] if len(found["kinds"]) == 1 else ["all", *found["kinds"]]:
        if (part := total if name == "all" else found["kinds"][name])["completed"]:
            lines += ["", *_percentiles(name, part)]
    return "\n".join(lines)


def _percentiles(name: str, found: dict[str, Any]) -> Iterator[str]:
    head = "".join(f"{f'{p} %':>10}" for p in PERCENTILES)
    yield f"{name + ', ' + str(found['completed']) + ' replies':<30}{head}{'values':>9}"
    for label, key, scale, form in LATENCIES:
        if key in found["latencies"]:
            row = found["latencies"][key]
            yield (
                f"{label:<30}"
                + "".join(f"{row[str(p)] * scale:>10{form}}" for p in PERCENTILES)
                + f"{row['values']:>9}"
            )


def plot(answers: Sequence[Answer], path: Path) -> None:
    """Draw how latencies are distributed, and tokens per second over the time of the run, to a PNG."""
    from matplotlib.figure import Figure

    good = [answer for answer in answers if answer.failure is None]
    panels: list[Callable[[Any], None]] = [lambda axes: _draw_latencies(axes, good)]
    steps = _tokens_over_time(answers)
    if len(steps):
        panels.append(lambda axes: _draw_tokens(axes, steps))
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for axes, draw in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _draw_latencies(axes: Any, good: Sequence[Answer]) -> None:
    labels = {key: label.rpartition(",")[0] for label, key, _, _ in LATENCIES}
    values = [measured(answer) for answer in good]
    for key in DISTRIBUTIONS:
        pooled = np.sort([v for one in values for v in one.get(key, ())])
        if len(pooled):
            shares = np.arange(len(pooled) + 1) / len(pooled)
            axes.step([pooled[0], *pooled], shares, where="post", label=labels[key])
    axes.set(xlabel="seconds", ylabel="share of replies that took at most this", ylim=(0, 1.02), xscale="log")
    if axes.lines:
        axes.legend()


def _tokens_over_time(answers: Sequence[Answer]) -> np.ndarray:
    """When tokens came and how many, float64 [n, 2]; empty where the server counts only at the end of a reply."""
    steps = [
        (now, more - fewer)
        for answer in answers
        if len({count for _, count in answer.counts if count}) > 1
        for (_, fewer), (now, more) in pairwise([(0.0, 0), *answer.counts])
    ]
    return np.array(steps, float).reshape(-1, 2)


def _draw_tokens(axes: Any, steps: np.ndarray) -> None:
    end = steps[:, 0].max()
    counts, edges = np.histogram(steps[:, 0], BINS, (0, end), weights=steps[:, 1])
    axes.stairs(counts / np.diff(edges), edges)
    axes.set(xlabel="seconds after the first request", ylabel="tokens per second", xlim=(0, end), ylim=(0, None))
