"""Metrics: what a client sees is what is counted."""

import numpy as np

from omni_jax.decode.reply import Event, Reply
from omni_jax.serve import metrics as module
from omni_jax.serve.metrics import Metrics


def _values(metrics):
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_reply_that_speaks(monkeypatch):
    now = [100.5]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    metrics = Metrics(3, lambda: 2, lambda: 5)
    second = np.zeros(24_000, np.float32)
    watch = metrics.watch(7, 100.0)  # it was read before the prompt was ready
    stats = {"frames": 25, "audio_seconds": 2.0, "rounds": 2, "round_tokens": [3, 2]}
    for at, event in [
        (101.0, Event("a", [1])),
        (102.0, Event("", [], audio=second)),
        (103.5, Event("b", [2, 3], audio=second)),  # half a second too late
        (104.0, Event("", [], Reply("ab", [1, 2, 3], stats))),
    ]:
        now[0] = at
        watch.event(event)
    found = _values(metrics)
    metrics.close()
    assert "# HELP omni_jax_running Replies in slots, and texts that are read aloud\n" in metrics.text().decode()
    for name, value in {
        "prompt_tokens_total": 7, "generated_tokens_total": 3, "time_to_first_token_seconds_sum": 1,
        "time_between_tokens_seconds_sum": 1.25, "time_to_first_audio_seconds_sum": 2, "reply_seconds_sum": 4,
        "audio_real_time_factor_sum": 2, "audio_underruns_total": 1, "audio_underrun_seconds_total": 0.5,
        "audio_frames_total": 25, "draft_rounds_total": 2, "draft_round_tokens_total": 5, "slots": 3, "running": 2,
        "waiting": 3,
    }.items():  # fmt: skip
        assert found[f"omni_jax_{name}"] == value, name


def test_servers_beside_each_other_and_programs():
    import jax

    one, other = Metrics(1, lambda: 0, lambda: 0), Metrics(2, lambda: 0, lambda: 0)
    jax.jit(lambda x: x * 3 + 1)(np.arange(3))
    assert _values(one)["omni_jax_compiled_programs"] >= 1 and _values(other)["omni_jax_slots"] == 2
    one.close()
    other.close()
