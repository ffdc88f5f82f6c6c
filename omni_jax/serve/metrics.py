"""What the server counts and times, for Prometheus.

Times are those that a client sees, from the moment its request was read. A player that starts with the first piece of
speech underruns when the next one comes after it has played all that it has.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack

from omni_jax.decode.reply import Event, Reply
from omni_jax.decode.shares import compilations
from omni_jax.models.code2wav import SAMPLES_PER_SECOND

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FACTORS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 5, 10)


class Metrics:
    """All metrics of one server; `text` shows them."""

    def __init__(self, slots: int, running: Callable[[], int], accepted: Callable[[], int]):
        """slots: of the engine. running: replies in slots, and texts that are read aloud, which have rows of their own.

        accepted: all that are under way or wait.
        """
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = self.registry = CollectorRegistry()
        prefix = {"namespace": "omni_jax", "registry": registry}
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **prefix)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **prefix)
        self.tokens = Counter("generated_tokens", "Tokens of replies", **prefix)
        self.frames = Counter("audio_frames", "Frames of speech, of 80 ms", **prefix)
        self.first_token = Histogram("time_to_first_token_seconds", "Until the first token", buckets=SECONDS, **prefix)
        self.between = Histogram("time_between_tokens_seconds", "Between tokens, by reply", buckets=SECONDS, **prefix)
        self.first_audio = Histogram("time_to_first_audio_seconds", "Until the first speech", buckets=SECONDS, **prefix)
        self.whole = Histogram("reply_seconds", "Until the end of a reply", buckets=SECONDS, **prefix)
        self.factor = Histogram("audio_real_time_factor", "Time per second of speech", buckets=FACTORS, **prefix)
        self.underruns = Counter("audio_underruns", "Pieces of speech that came too late", **prefix)
        self.late = Counter("audio_underrun_seconds", "Time that they came too late", **prefix)
        self.rounds = Counter("draft_rounds", "Rounds of drafting", **prefix)
        self.round_tokens = Counter("draft_round_tokens", "Tokens that these rounds gave", **prefix)
        Gauge("slots", "Replies that run at once", **prefix).set(slots)
        Gauge("running", "Replies in slots, and texts that are read aloud", **prefix).set_function(running)
        Gauge("waiting", "Replies that wait", **prefix).set_function(lambda: max(accepted() - running(), 0))
        self._stack = ExitStack()
        self._compiled = self._stack.enter_context(compilations())
        Gauge("compiled_programs", "Programs compiled", **prefix).set_function(lambda: self.compiled)

    @property
    def compiled(self) -> int:
        """The number of programs compiled since it was made."""
        return len(self._compiled)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def close(self) -> None:
        """Count no more."""
        self._stack.close()

    def watch(self, prompt_tokens: int, start: float) -> "Watch":
        """What times one reply; start: when its request was read, of `time.monotonic`."""
        self.prompt_tokens.inc(prompt_tokens)
        return Watch(self, start)

    def count(self, route: str, status: int) -> None:
        """Count a request that is answered."""
        self.requests.labels(route, str(status)).inc()


class Watch:
    """Times the events of one reply."""

    def __init__(self, metrics: Metrics, start: float):
        self._metrics, self._start = metrics, start
        self._first_token = self._last_token = self._first_audio = self._played = 0.0
        self._tokens = 0

    def event(self, event: Event) -> None:
        """Take note of an event that comes now."""
        now = time.monotonic()
        if event.token_ids:
            self._metrics.tokens.inc(len(event.token_ids))
            if not self._tokens:
                self._first_token = now
                self._metrics.first_token.observe(now - self._start)
            self._tokens, self._last_token = self._tokens + len(event.token_ids), now
        if event.audio is not None and event.audio.size:
            self._sound(now, event.audio.size / SAMPLES_PER_SECOND)
        if event.reply is not None:
            self._end(now, event.reply)

    def _sound(self, now: float, seconds: float) -> None:
        """A piece of speech comes, while the player has sound until `_played`."""
        if not self._first_audio:
            self._first_audio = self._played = now
            self._metrics.first_audio.observe(now - self._start)
        elif now > self._played:
            self._metrics.underruns.inc()
            self._metrics.late.inc(now - self._played)
            self._played = now
        self._played += seconds

    def _end(self, now: float, reply: Reply) -> None:
        metrics, stats = self._metrics, reply.stats
        metrics.whole.observe(now - self._start)
        if self._tokens > 1:
            metrics.between.observe((self._last_token - self._first_token) / (self._tokens - 1))
        if stats.get("audio_seconds"):
            metrics.frames.inc(stats["frames"])
            metrics.factor.observe((now - self._start) / stats["audio_seconds"])
        if "rounds" in stats:
            metrics.rounds.inc(stats["rounds"])
            metrics.round_tokens.inc(sum(stats["round_tokens"]))
