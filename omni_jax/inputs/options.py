"""Options of media: sizes in pixels, frames and spans, stated in a part of a message or for all parts of a call.

Options of a part override those of the call. What is stated nowhere follows from the checkpoint (`settings`).

Source: names, meanings and limits are those of the official utilities, qwen-omni-utils 0.0.9 (`fetch_image`,
`fetch_video`, `smart_nframes`, `process_audio_info`). Deliberate difference: what these ignore silently (a height
without a width, min_frames above max_frames, an unknown name) is an error.
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.values import plain

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_FRAMES = ("fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end")
# The options that a part of each kind may state.
OPTIONS = {
    "image": _SIZES,
    "video": (*_SIZES, *_FRAMES, "use_audio_in_video"),
    "audio": ("audio_start", "audio_end"),
}
# The rate of an array or of a list of frames, which are sampled already. `fps` is accepted for it too.
RATES = {"audio": "sampling_rate", "video": "sample_fps"}
_COUNTS = ("resized_height", "resized_width", "nframes", "min_frames", "max_frames")
_PAIRS = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"))  # the second is not less than the first
MOST = 1e12  # the largest number accepted; no media are so large


@dataclass(frozen=True)
class Options:
    """How media are resized, sampled and cut; None for what is not stated.

    min_pixels, max_pixels: the area of a resized picture or frame. resized_height, resized_width: its sides, rounded to
    whole merged tokens. fps: frames per second of a video, at least min_frames and at most max_frames of them; or
    nframes in all. total_pixels: of all frames. video_start, video_end, audio_start, audio_end: seconds.
    """

    min_pixels: float | None = None
    max_pixels: float | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: float | None = None
    video_start: float | None = None
    video_end: float | None = None
    audio_start: float | None = None
    audio_end: float | None = None
    use_audio_in_video: bool | None = None

    def over(self, defaults: "Options") -> "Options":
        """These options, completed with those `defaults` that they neither state nor replace."""
        stated = {name: value for name, value in vars(self).items() if value is not None}
        replaced = set(stated)
        replaced |= {"fps", "nframes"} if replaced & {"fps", "nframes"} else set()
        replaced |= {"resized_height", "resized_width"} if replaced & set(_SIZES) else set()
        kept = {name: value for name, value in vars(defaults).items() if name not in replaced and value is not None}
        for low, high in _PAIRS:
            least, most = ({**kept, **stated}.get(name) for name in (low, high))
            if least is not None and most is not None and least > most:
                kept = {name: value for name, value in kept.items() if name not in (low, high)}
        return Options(**kept | stated)


UNSTATED = Options()


def read_options(values: Mapping[str, Any], where: str) -> Options:
    """The options among `values`; other names are left to the caller. InputError for values that are impossible."""
    names = [field.name for field in fields(Options)]
    options = Options(**{name: _value(name, values[name], where) for name in names if values.get(name) is not None})
    check_options(options, where)
    return options


def check_options(options: Options, where: str) -> None:
    """Raise InputError for options that contradict each other, within a part or between a part and its call."""
    if options.nframes is not None and options.fps is not None:
        raise InputError(f"{where}: 'nframes' and 'fps' contradict each other; give one of them")
    if (options.resized_height is None) != (options.resized_width is None):
        raise InputError(f"{where}: 'resized_height' and 'resized_width' go together; give both")
    for low, high in _PAIRS:
        least, most = getattr(options, low), getattr(options, high)
        if least is not None and most is not None and least > most:
            raise InputError(f"{where}: {low!r} is {least:g}, more than {high!r} of {most:g}; exchange them")
    for start, end in (("video_start", "video_end"), ("audio_start", "audio_end")):
        first, last = getattr(options, start) or 0, getattr(options, end)
        if last is not None and first >= last:
            raise InputError(
                f"{where}: {end!r} of {last:g} s is not after {start!r} of {first:g} s; give a longer span"
            )


def read_defaults(given: Any, fps: Any, use_audio_in_video: Any) -> Options:
    """Options for all parts of a call: a mapping of names to values, and the two that are arguments of their own."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise InputError(f"media is of type {type(given).__name__}; give options as a dict, such as {{'nframes': 8}}")
    names = [field.name for field in fields(Options)]
    unknown = [name for name, value in given.items() if name not in names and value is not None]
    if unknown:
        raise InputError(f"media has the unknown option {unknown[0]!r}{did_you_mean(unknown[0], names)}")
    own = {"fps": fps, "use_audio_in_video": use_audio_in_video or None}
    twice = [name for name, value in own.items() if value is not None and given.get(name) not in (None, value)]
    if twice:
        raise InputError(f"{twice[0]!r} is stated twice, in media and beside it; leave one out")
    return read_options({**given, **{name: value for name, value in own.items() if value is not None}}, "the call")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the one that was probably meant, or else all known ones."""
    close = difflib.get_close_matches(str(name)[:80], list(known), 1, 0.75)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def number(value: Any, what: str) -> float:
    """A number above zero, of Python, NumPy or JAX, as an int or float; InputError for anything else."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not 0 < (given := _python(found)) <= MOST:
        raise InputError(f"{what} is {_shown(value)}; give a positive number of at most {MOST:g}")
    return given


def _python(value: numbers.Real) -> float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _value(name: str, value: Any, where: str) -> Any:
    what = f"{where}: {name!r}"
    if name == "use_audio_in_video":
        if type(value).__name__ not in ("bool", "bool_"):  # bool_ in NumPy
            raise InputError(f"{what} is {_shown(value)}; give True or False")
        return bool(value)
    if name.endswith("_start") and type(value) is not bool and value == 0:
        return 0.0
    checked = number(value, what)
    if name in _COUNTS and checked != math.floor(checked):
        raise InputError(f"{what} is {_shown(value)}; give a whole number")
    return int(checked) if name in _COUNTS else checked


def _shown(value: Any) -> str:
    if isinstance(value, int) and value > MOST:  # Python refuses to print very long integers
        return "a number of more than 12 digits"
    return repr(value)[:40] if isinstance(value, (str, numbers.Number)) else f"of type {type(value).__name__}"
