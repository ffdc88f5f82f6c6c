"""Where media come from: a local path or bytes. Nothing is ever downloaded.

`image`, `audio` and `video` open a user's files through `open_source`, so that URLs, playlists, directories and missing
files are refused in one place with one remedy. Decoders get an open file, never a name: a name could make FFmpeg follow
another protocol. `open_container` restricts the containers that FFmpeg may recognise.
"""

import io
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from omni_jax.errors import InputError, OmniError
from omni_jax.files import reason_of, user_path

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.stream import Stream

Source = str | os.PathLike | bytes | bytearray | memoryview

MAX_WALL_SECONDS = 600.0  # for one file, decoding included

# At least two letters, because C:\clip.mp4 is a path; and more than a colon, because note:12.png is one too.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):(?://|\\\\)|(data|file|blob|concatf?|subfile|pipe|fd|cache|crypto):", re.I)
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<?xml", b"<MPD", b"<!DOCTYPE", b"<html")
# FFmpeg's names of containers that hold media themselves, without those that refer to other files (hls, concat, dash).
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2|matroska,webm|avi|mpeg|mpegts|mpegvideo|m4v|h264|hevc|flv|asf|ogg|wav|w64|flac|mp3|aac|"
    "ac3|aiff|au|amr|caf|wv|gif"
)

# Containers among these whose header states the duration; for others FFmpeg estimates it from the size of the file.
STATE_DURATION = ("mov", "matroska", "flv")
_MISSING_SECONDS = 0.5  # a stated duration may be rounded, or count samples that the decoder drops


def scheme_of(text: str) -> str:
    """The scheme of a URL, in lower case ("https", "data", "file"); "" for a path, which may contain colons too."""
    found = _ADDRESS.match(text)
    return (found[1] or found[2]).lower() if found else ""


def is_source(value: object) -> bool:
    """Whether `value` is a path or bytes."""
    return isinstance(value, Source)


@contextmanager
def reading(source: object, kind: str, trouble: str = "damaged, or not a media file") -> Iterator[None]:
    """Turn any error that a decoder raises in the block into one InputError: the source, `trouble` and the reason.

    Decoders of damaged files raise many kinds: OSError, UnicodeDecodeError, AttributeError, RuntimeError, ...
    """
    try:
        yield
    except OmniError:
        raise
    except MemoryError:
        raise InputError(f"{kind} {name_of(source)}: it needs more memory than there is; make it smaller") from None
    except Exception as error:
        reason = reason_of(error)
        # Python's message about a bug of a decoder, or FFmpeg's about an unnamed error, would not help.
        if isinstance(error, AttributeError | TypeError | LookupError | UnicodeError) or "error number" in reason:
            reason = ""
        said = f"{kind} {name_of(source)}: {trouble}{reason and f' ({reason})'}"
        raise InputError(f"{said}; make a new copy, or pass another") from error


class MediaFile(io.RawIOBase, BinaryIO):
    """An open file for decoders in C, whose callbacks lose exceptions: it keeps the first one and then reads as ended.

    Positions stay within the file. It also reads as ended `MAX_WALL_SECONDS` after it was opened, which bounds the time
    of any decoder.
    """

    def __init__(self, file: BinaryIO):
        self.error: BaseException | None = None
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        self._deadline = time.monotonic() + MAX_WALL_SECONDS
        self._at, self._bytes = 0, b""
        file.seek(0)

    def mend(self, at: int, data: bytes) -> None:
        """From now on, read `data` in place of the bytes at position `at`."""
        self._at, self._bytes = at, data

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for any file, but the position stays within it."""
        try:
            origin = (0, self._file.tell(), self._size)[whence]
            return self._file.seek(min(max(origin + offset, 0), self._size))
        except BaseException as error:
            self.error = self.error or error
            return 0

    def tell(self) -> int:
        """As of a file."""
        return self.seek(0, io.SEEK_CUR)

    def read(self, size: int | None = -1) -> bytes:
        """As for any file; empty after an exception."""
        try:
            if time.monotonic() > self._deadline:
                raise InputError(f"decoding takes more than {MAX_WALL_SECONDS:.0f} s; cut it into parts")
            start = self._file.tell()
            data = b"" if self.error else self._file.read(-1 if size is None else size) or b""
        except BaseException as error:
            self.error = self.error or error
            return b""
        begin, end = max(self._at - start, 0), self._at + len(self._bytes) - start
        if end <= 0 or begin >= len(data):
            return data
        return (data[:begin] + self._bytes[max(start - self._at, 0) :] + data[end:])[: len(data)]

    def readinto(self, buffer: Any) -> int:
        """As of a file."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_source(source: Source, kind: str) -> Iterator[MediaFile]:
    """Open a path or bytes for reading; `kind` ("audio", "image", "video") names it in errors.

    Raises InputError for a URL, a playlist, an empty or missing file, anything that is not a regular file, and, at the
    end, for an error while it was read.
    """
    with reading(source, kind, "cannot be read"):
        opened = _open_path(source, kind) if isinstance(source, str | os.PathLike) else io.BytesIO(source)
    with opened:
        with reading(source, kind, "cannot be read"):
            file = MediaFile(opened)
            head = file.read(64)
            file.seek(0)
            if file.error:
                raise file.error
        if not head:
            raise InputError(f"{kind} {name_of(source)}: it is empty")
        playlists = [begin for begin in _PLAYLISTS if kind != "image" or begin != b"<?xml"]  # SVG begins so
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(tuple(playlists)):
            raise InputError(f"{kind} {name_of(source)}: a playlist or web page; pass the media file itself")
        try:
            yield file
        finally:
            if file.error:
                with reading(source, kind, "cannot be read"):
                    raise file.error


def _open_path(given: str | os.PathLike, kind: str) -> BinaryIO:
    if isinstance(given, str) and scheme_of(given):
        raise InputError(f"{kind} {given[:80]!r} is a URL; nothing is fetched: pass a local path or bytes")
    path = user_path(given, kind)
    try:
        # Non-blocking, so that a pipe without a writer is refused below, without waiting.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{kind} {name_of(path)}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{kind} {name_of(path)}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{kind} {name_of(path)}: not a regular file; pass the media file itself")
    return os.fdopen(descriptor, "rb")


def name_of(source: object) -> str:
    """The name of a source in an error."""
    if isinstance(source, str | os.PathLike):
        return repr(str(Path(source)))[:200]
    if isinstance(source, bytes | bytearray | memoryview):
        return f"of {memoryview(source).nbytes} bytes"
    return f"of type {type(source).__name__}"


@contextmanager
def open_container(source: Source, kind: str) -> Iterator["InputContainer"]:
    """Open a path or bytes as a media container; the decoder's errors, here and in the block, become InputError."""
    with open_source(source, kind) as file, reading(source, kind), container_in(file) as container:
        yield container


@contextmanager
def container_in(file: MediaFile) -> Iterator["InputContainer"]:
    """The media container that an open file holds."""
    import av

    options = {"format_whitelist": _CONTAINERS.replace("|", ",")}
    # Titles and other tags are often in an older encoding; they are not used.
    with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
        yield container


def demux(container: "InputContainer", stream: "Stream", what: str) -> Iterator["Packet"]:
    """The packets of `stream`, including the empty ones that flush its decoder; InputError for a truncated file."""
    end = 0.0
    for packet in container.demux():
        if packet.is_corrupt:
            raise InputError(f"{what}: cut short or damaged after {end:.1f} s; re-encode it")
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:  # its stream_index is 0 if it only flushes
            yield packet
    stated = (container.duration or 0) / 1e6
    if container.format.name.startswith(STATE_DURATION) and end < stated - _MISSING_SECONDS:
        raise InputError(f"{what}: cut short, {end:.1f} of {stated:.1f} s are there")
