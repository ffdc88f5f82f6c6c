"""Media of a request as bytes, under a policy; the one place where a server reads files or URLs that clients name.

`inputs.messages` accepts local paths and `file:` URLs, because the messages of its callers are their own. Those of a
server's clients pass through here first: afterwards every medium is bytes, or text in base64 that the messages carry,
and no path or URL is left. Anything else that a part may hold is refused.

    messages -> resolve -> messages in Hugging Face's form with bytes -> Omni.prepare
"""

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS, URLS
from omni_jax.inputs.source import scheme_of
from omni_jax.inputs.values import shown
from omni_jax.serve.errors import invalid, naming, too_large
from omni_jax.serve.fetch import Reach, fetch

FETCHES = 8  # at the same time, of all requests
_PLACES = ("url", "path", "base64")  # keys of a medium, besides the name of its kind
_LOCAL_HOSTS = ("", "localhost")


@dataclass(frozen=True)
class Policy:
    """What a request may bring.

    folder: where local files may lie; None for no local files. reach: what may be fetched. most_bytes: of all its files
    and fetched media together. most_media: their number, each frame of a list counted.
    """

    folder: Path | None = None
    reach: Reach = field(default_factory=Reach)
    most_bytes: int = 256 << 20
    most_media: int = 256


class Media:
    """Resolves the media of requests; `resolve` is the only use."""

    def __init__(self, policy: Policy):
        """Raises InputError for a folder that is none."""
        self.policy, self._fetching = policy, ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._folder = None if policy.folder is None else Path(os.path.realpath(policy.folder))
        if self._folder is not None and not self._folder.is_dir():
            raise InputError(f"{policy.folder} is no folder; name the one that media may lie in")

    async def resolve(self, messages: list[Any]) -> list[Any]:
        """The same messages with all media as bytes or base64; RequestError for one that is not allowed or too large.

        Messages and parts of a wrong form that cannot name a medium are left as they are, for `inputs.messages`.
        """
        loading = _Loading(self)
        return [await loading.message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    async def load(self, source: str, left: int, where: str) -> bytes | str:
        """The bytes of a source, at most `left`; text that holds its data itself is returned as it is."""
        scheme = scheme_of(source)
        if scheme == "data":
            return source
        if scheme in ("http", "https"):
            loop, reach = asyncio.get_running_loop(), self.policy.reach
            work = loop.run_in_executor(self._fetching, fetch, source, left, reach)
            try:
                return await asyncio.wait_for(work, reach.seconds + 5)
            except TimeoutError:
                raise invalid(f"{where}: it took more than {reach.seconds:g} s to fetch; send a data: URL") from None
        if scheme not in ("", "file"):
            raise invalid(f"{where}: media of the scheme {scheme[:40]!r} are not read; send a data: URL", where)
        return await asyncio.to_thread(self._read, source, left, where)

    def _read(self, source: str, left: int, where: str) -> bytes:
        """The bytes of a file in the folder."""
        if self._folder is None:
            raise invalid(f"{where}: local files are not read; send a data: URL, or ask who runs the server for "
                          "--allowed-local-media-path", where)  # fmt: skip
        path = os.path.realpath(self._folder / _path_of(source, where))
        refusal = invalid(f"{where}: there is no such file in the folder that media may lie in", where)
        if not Path(path).is_relative_to(self._folder):
            raise refusal
        try:
            # The path has no links any more: one that is put there meanwhile is not followed.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (OSError, ValueError):
            raise refusal from None
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode) or not _still_inside(descriptor, self._folder):
            os.close(descriptor)
            raise refusal
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(left + 1) if opened.st_size <= left else b""
            if opened.st_size > left or len(data) > left:
                raise too_large(f"{where}: the file has more than the {left:,} bytes that are left of the media of one "
                                "request", where)  # fmt: skip
            return data


def _still_inside(descriptor: int, folder: Path) -> bool:
    """Whether an open file lies in a folder, where the system tells."""
    link = f"/proc/self/fd/{descriptor}"
    return not os.path.exists(link) or Path(os.path.realpath(link)).is_relative_to(folder)


def _path_of(source: str, where: str) -> str:
    """The path that a path or a file: URL names."""
    if "\0" in source:
        raise invalid(f"{where}: a path with a null character", where)
    if scheme_of(source) != "file":
        return source
    try:
        parts = urlsplit(source)
    except ValueError:
        raise invalid(f"{where}: no valid URL", where) from None
    path = unquote(parts.path)
    if parts.netloc.lower() not in _LOCAL_HOSTS or "\0" in path:
        raise invalid(f"{where}: a file: URL of another host; write file:///path", where)
    return path


class _Loading:
    """The media of one request as they are loaded, and what is left of its limits."""

    def __init__(self, media: Media):
        self._media, self._bytes, self._count = media, media.policy.most_bytes, media.policy.most_media

    async def message(self, message: Any, where: str) -> Any:
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        content = message["content"]
        parts = [await self._part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        return message | {"content": parts}

    async def _part(self, given: Any, where: str) -> Any:
        """A part of a message; a medium in Hugging Face's form, its options beside it."""
        if not isinstance(given, dict):
            return given
        part = {key: value for key, value in given.items() if value is not None}
        form = part.pop("type", None)
        if form in KINDS:
            kind, keys = form, [key for key in (form, *_PLACES) if key in part]
            if len(keys) != 1:
                raise invalid(f"{where}: a part of type {kind!r} holds exactly one of {[kind, *_PLACES]}", where)
            source = part.pop(keys[0])
            is_base64 = keys[0] == "base64"
        elif form in URLS:
            kind, source, is_base64 = form.removesuffix("_url"), part.pop(form, None), False
        elif form == "input_audio":
            kind, source, is_base64 = "audio", _data_of(part.pop(form, None), where), True
        else:
            return given
        if is_base64:
            return {"type": kind, **part, **await self._encoded(source, kind, where)}
        return {"type": kind, **part, kind: await self._source(source, kind, where)}

    async def _encoded(self, source: Any, kind: str, where: str) -> dict[str, Any]:
        """A medium whose data are written in base64, perhaps as a data: URL."""
        self._take_one(where)
        if isinstance(source, bytes):
            return {kind: source}
        if not isinstance(source, str) or scheme_of(source) not in ("", "data"):
            raise invalid(f"{where}: the data are {shown(source)}; send them in base64", where)
        return {kind: source} if scheme_of(source) else {"base64": source}

    async def _source(self, source: Any, kind: str, where: str) -> Any:
        """What takes the place of a source: a text, {"url": text}, bytes, or a list of these, the frames of a video."""
        if kind == "video" and isinstance(source, list):
            return [await self._source(frame, "image", f"{where}[{i}]") for i, frame in enumerate(source)]
        if isinstance(source, dict):
            source = source.get("url")
        self._take_one(where)
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str) or not source:
            raise invalid(f"{where}: the {kind} is {shown(source)}; send its URL, such as data:...;base64,...", where)
        with naming({}, where):
            loaded = await self._media.load(source, self._bytes, where)
        self._bytes -= len(loaded) if isinstance(loaded, bytes) else 0
        return loaded

    def _take_one(self, where: str) -> None:
        self._count -= 1
        if self._count < 0:
            most = self._media.policy.most_media
            raise too_large(f"{where}: more than {most} pictures, sounds and videos in one request; send fewer", where)


def _data_of(sound: Any, where: str) -> Any:
    """The data of OpenAI's {"data": base64, "format": "wav"}, whose format is recognised from the data."""
    if not isinstance(sound, dict) or sound.get("data") is None:
        raise invalid(f"{where}: input_audio is {shown(sound)}; send {{'data': base64, 'format': 'wav'}}", where)
    if sound.get("format") in ("pcm16", "pcm", "raw"):
        raise invalid(f"{where}: format {sound['format']!r} states no sampling rate; send wav", f"{where}.format")
    return sound["data"]
