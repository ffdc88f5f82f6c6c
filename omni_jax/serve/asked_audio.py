"""The requests of /v1/audio, checked as those of `asked` are: a text to say, and a sound to write down.

Source: OpenAI's audio API. Deliberate differences: `input` may be longer than 4096 characters; `speed` and
`instructions`, which this model's Talker does not know, and formats of transcripts with time stamps, which it does not
make, are refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omni_jax.serve.asked import SETTINGS, Asked, Defaults, format_of, known_fields, read_chat, text_of
from omni_jax.serve.errors import invalid
from omni_jax.settings import Settings

MOST_CHARACTERS = 100_000  # of a text to say; hours of speech
SPEAK = ("model", "input", "voice", "speaker", "response_format", "stream_format", "seed")
VOICE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.startswith(("speech_", "max_frames")))
NEUTRAL: dict[str, tuple[Any, ...]] = {"speed": (1,), "instructions": ("",)}
TRANSCRIBE = ("model", "language", "prompt", "response_format", "temperature", "stream", "seed", "max_tokens")
IGNORED = frozenset(("user", "include[]", "chunking_strategy"))
# Names of languages by their codes, those that the model hears.
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "ms": "Malay", "nl": "Dutch", "pt": "Portuguese",
    "ru": "Russian", "th": "Thai", "tr": "Turkish", "ur": "Urdu", "vi": "Vietnamese", "yue": "Cantonese",
    "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AskedSpeech:
    """A text to say.

    settings: the voice and the seed. sound: the format. events: whether it is sent as events. names: as in `Asked`.
    """

    text: str
    settings: Settings
    sound: str = "mp3"
    events: bool = False
    model: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AskedTranscript:
    """A sound to write down, as a chat request with the sound in it. form: "json" or "text"."""

    chat: Asked
    form: str = "json"


def read_speech(body: Any, defaults: Defaults) -> AskedSpeech:
    """The request that the body of /v1/audio/speech states; RequestError for one that cannot be."""
    given = known_fields(body, (*SPEAK, *VOICE_SETTINGS), frozenset(("user",)), NEUTRAL)
    text = text_of(given, "input")
    if not text or not text.strip():
        raise invalid("input is empty; send the text to say", "input")
    if len(text) > MOST_CHARACTERS:
        raise invalid(f"input has {len(text):,} characters; at most {MOST_CHARACTERS:,} are said at once", "input")
    form = given.get("stream_format", "audio")
    if form not in ("audio", "sse"):
        raise invalid(f"stream_format is {str(form)[:40]!r}; it is 'audio' or 'sse'", "stream_format")
    # The rest is what a chat request states about its speech.
    voices = {name: given[name] for name in ("voice", "speaker", "seed", *VOICE_SETTINGS) if name in given}
    chat = read_chat({"messages": [{"role": "user", "content": text}], "modalities": ["audio"], **voices}, defaults)
    names = {**chat.names, "speaker": "voice" if "voice" in given else "speaker"}
    sound = format_of(given.get("response_format", "mp3"), "response_format")
    return AskedSpeech(text, chat.settings, sound, form == "sse", text_of(given, "model"), names)


def read_transcription(form: Mapping[str, Any], sound: bytes, instruction: str, defaults: Defaults) -> AskedTranscript:
    """The request that the form of /v1/audio/transcriptions states; RequestError for one that cannot be.

    form: its fields but the file. sound: the file. instruction: what the model is asked to do, with "{language}" where
    the name of a language and a space go.
    """
    given = known_fields(dict(form), TRANSCRIBE, IGNORED, {"timestamp_granularities[]": ()})
    kind = given.get("response_format", "json")
    if kind not in ("json", "text"):
        raise invalid(f"response_format is {str(kind)[:40]!r}; transcripts are sent as 'json' or 'text'",
                      "response_format")  # fmt: skip
    words = instruction.replace("{language}", _language(text_of(given, "language")))
    if hint := text_of(given, "prompt"):
        words = f"{words}\n{hint}"
    numbers = {name: _number(given[name], name) for name in ("temperature", "seed", "max_tokens") if name in given}
    content = [{"type": "audio", "audio": sound}, {"type": "text", "text": words}]
    body = {"messages": [{"role": "user", "content": content}], **numbers, "stream": _flag(given.get("stream"))}
    return AskedTranscript(replace(read_chat(body, defaults), model=text_of(given, "model")), kind)


def _language(code: str | None) -> str:
    """The name of a language and a space, or nothing if none is stated."""
    if not code:
        return ""
    name = LANGUAGES.get(code.lower().split("-")[0])
    known = {language.lower(): language for language in LANGUAGES.values()}
    name = name or known.get(code.lower())
    if name is None:
        raise invalid(f"language is {code[:40]!r}; the model hears {', '.join(LANGUAGES)}", "language")
    return f"{name} "


def _number(text: Any, name: str) -> float | int:
    """The number that a field of a form spells."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise invalid(f"{name} is {str(text)[:40]!r}; it is a number", name)
    return int(value) if value == int(value) else value


def _flag(text: Any) -> bool:
    """The truth that a field of a form spells, false if it is absent."""
    if text not in (None, "true", "false", "True", "False", "1", "0"):
        raise invalid(f"stream is {str(text)[:40]!r}; it is true or false", "stream")
    return text in ("true", "True", "1")
