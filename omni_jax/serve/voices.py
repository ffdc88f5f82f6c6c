"""Voices by the names that clients know: the model's speakers, and OpenAI's voices as other names of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_jax.inputs.values import shown
from omni_jax.serve.errors import invalid

# OpenAI's voices, and the speakers of Qwen3-Omni that stand for them.
ALIASES = {
    "alloy": "chelsie", "ash": "ethan", "ballad": "aiden", "coral": "chelsie", "echo": "ethan", "fable": "aiden",
    "onyx": "aiden", "nova": "chelsie", "sage": "chelsie", "shimmer": "chelsie", "verse": "ethan", "marin": "chelsie",
    "cedar": "ethan",
}  # fmt: skip


def speaker_of(given: Mapping[str, Any], audio: Mapping[str, Any], voices: Sequence[str] | None) -> dict[str, str]:
    """The setting `speaker` that a body states by any of its names, {} if by none; RequestError for several.

    audio: the body's object of this name. voices: the model's speakers, None where they are not known. An alias whose
    speaker the model does not have is as if no voice were stated.
    """
    names = {"voice": given.get("voice"), "speaker": given.get("speaker"), "audio.voice": audio.get("voice")}
    named = {field: _name_of(voice, field) for field, voice in names.items() if voice is not None}
    if not named:
        return {}
    if len({name.lower() for name in named.values()}) > 1:
        stated = " and ".join(f"{field} is {shown(name)}" for field, name in named.items())
        raise invalid(f"{stated}; send one", "audio.voice")
    field, name = next(iter(named.items()))
    known = None if voices is None else [voice.lower() for voice in voices]
    alias = None if name.lower() in (known or ()) else ALIASES.get(name.lower())
    if alias is not None:
        return {"speaker": alias} if known is None or alias in known else {}
    if known and name.lower() not in known:
        raise invalid(f"there is no voice {name[:80]!r}; there are {', '.join(known)}", field)
    return {"speaker": name}


def _name_of(voice: Any, field: str) -> str:
    """The name of a voice, which may be wrapped as {"id": name}."""
    name = voice.get("id") if isinstance(voice, dict) else voice
    if not isinstance(name, str) or not name:
        raise invalid(f"{field} is {shown(voice)}; it is the name of a speaker", field)
    return name
