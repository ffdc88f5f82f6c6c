"""docs/serving.md, held against the source: its tables name the fields, flags, metrics and languages that there are."""

import re
from dataclasses import fields
from pathlib import Path

from omni_jax.serve import app, asked, asked_audio, connections, guard, sounds, voices
from omni_jax.serve.command import AdmissionFlags, ListenFlags
from omni_jax.serve.metrics import Metrics

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SPEECH = {name for name in asked_audio.VOICE_SETTINGS if name != "max_frames"}  # "as for chat, by any of their names"


def _section(heading: str) -> str:
    return re.split(r"^#+ ", DOCUMENT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def _names(text: str) -> list[str]:
    return re.findall(r"`([\w.\[\]]+)`", text)


def _first_column(heading: str) -> list[str]:
    rows = re.findall(r"^\| (.*?) \|", _section(heading), re.M)
    return [name for row in rows for name in _names(row)]


def test_fields_of_chat():
    assert sorted(_first_column("Fields that are read")) == sorted({*asked.READ, *asked.SETTINGS})
    assert sorted(_names(_section("Fields that are ignored"))) == sorted(asked.IGNORED)
    assert sorted(_first_column("Fields that are refused")) == sorted(asked.NEUTRAL)


def test_limits():
    """Those that are constants are stated as they are."""
    limits = _section("Errors and limits")
    most, text = {name: f"{number:,}" for name, number in asked.MOST.items()}, f"{asked.MOST_STOP_CHARACTERS:,}"
    assert f"| `messages`, and parts in them; `tools` | {most['messages']} each; {most['tools']} |" in limits
    assert f"`stop_token_ids` | {most['stop']}, {text}; {most['stop_token_ids']} |" in limits
    assert f"| bodies of all requests under way, together | {guard.AT_ONCE} times" in limits
    assert f"counted by its commas | {app.MOST_VALUES:,} |" in limits
    seconds, kib = f"{connections.READ_SECONDS:g} s", f"{connections.READ_BYTES >> 10} KiB"
    assert f"to read what waits for it | {seconds}, and 1 s for each {kib} |" in limits
    assert f"| 0 to 2^63 - {asked.MOST_REPLIES};" in DOCUMENT  # reply i has the seed plus i, below 2^63


def test_fields_of_speech_and_transcription():
    said = {*asked_audio.SPEAK, *asked_audio.VOICE_SETTINGS, *asked_audio.NEUTRAL, "user"} - SPEECH
    assert {*_first_column("Text to speech")} - SPEECH == said
    written = {*asked_audio.TRANSCRIBE, *asked_audio.IGNORED, "file", "timestamp_granularities[]"}
    assert sorted(_first_column("Transcription")) == sorted(written)
    assert re.findall(r"\| `language` \| ([\w, ]+), or", DOCUMENT) == [", ".join(asked_audio.LANGUAGES)]


def test_flags():
    """Every flag of what is taken is named; no flag is named that the server, or `generate`, does not have."""
    named = set(re.findall(r"--([a-z][a-z-]+)", DOCUMENT))
    assert {one.name.replace("_", "-") for one in fields(AdmissionFlags)} <= named
    own = {one.name.replace("_", "-") for kind in (AdmissionFlags, ListenFlags) for one in fields(kind)}
    others = {"model", "drafter", "mesh", "help", "text-only", "transcription-prompt", "speaker", "max-frames",
              "distributed"}  # fmt: skip
    foreign = {
        "output",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "gpus-per-task",
        "signal",
        "build-arg",
        "gpus",
        "rm",
        "init",
    }
    assert named - own - others == foreign


def test_metrics():
    found = Metrics(1, lambda: 0, lambda: 0).text().decode()
    kinds = re.findall(r"^# TYPE omni_jax_(\w+) (\w+)$", found, re.M)
    assert sorted(_first_column("Metrics")) == sorted(name for name, _ in kinds if not name.endswith("_created"))


def test_formats():
    assert {*_names(_section("Speech in replies"))} >= {*sounds.FORMATS}


def test_other_names_of_voices():
    rows = re.findall(r"^\| (\w+) \| (`.*) \|$", _section("Speech in replies"), re.M)
    assert {name: speaker for speaker, names in rows for name in _names(names)} == voices.ALIASES
