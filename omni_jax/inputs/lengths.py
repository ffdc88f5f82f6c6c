"""The length that a sound file states in its header: WAV, AIFF, AU, CAF and their 64-bit variants.

Programs that write to a pipe or a socket cannot go back to the header, so they state a placeholder there.
`complete_length` runs before both decoders: it lets them read the true length instead, and refuses a file (FLAC and Ogg
too) that is truncated or holds a second recording after the first.

A stated length is a placeholder if it is zero, within 64 bytes of a multiple of 10^9, or within 64 KiB of a power of
two from 2^30 upwards: the largest number of some field, with or without headers, or rounded to whole frames, such as
2,000,000,000, 0x7fffffff, 0x7ffff000, 0x80000000, 0xffffffff - 36 and -1. Such a file is read to its end. Every other
length is believed, and a file that holds less is truncated. One in 10,000 true lengths above 1 GB looks like a
placeholder.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from omni_jax.errors import InputError
from omni_jax.inputs.source import MediaFile

MAX_CHUNKS = 1000  # before the sound; real files have a few
_ROUND = 10**9
_ROUND_SLACK, _POWER_SLACK = 64, 2**16  # bytes: with or without headers; rounding to frames or pages
# The first bytes of a FLAC or Ogg stream, and a position after the first headers (which may be of several streams).
_BEGINNINGS = {b"fLaC": b"fLaC\0\0\0\x22", b"OggS": b"OggS\0\2"}
_FIRST_HEADERS = 1024
Order = Literal["little", "big"]


@dataclass(frozen=True)
class _Layout:
    """The chunks of a format: position of the first, sizes of the name and length fields, name of the sound's chunk.

    counted: bytes of a chunk's own header that its length includes. align: alignment of a chunk's beginning.
    """

    first: int
    name_bytes: int
    length_bytes: int
    order: Order
    align: int
    counted: int
    sound: bytes


@dataclass(frozen=True)
class _Length:
    """A stated length of sound in bytes.

    at, width, order: position, bytes and byte order of the field. stated: its value, without `counted`, the bytes that
    it counts besides sound. start: where the sound begins.
    """

    at: int
    width: int
    order: Order
    stated: int
    start: int
    counted: int = 0


_WAVE = _Layout(12, 4, 4, "little", 2, 0, b"data")
_W64 = _Layout(40, 16, 8, "little", 8, 24, b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a")
_LAYOUTS = {
    b"RIFF": _WAVE,
    b"RF64": _WAVE,
    b"BW64": _WAVE,
    b"RIFX": _Layout(12, 4, 4, "big", 2, 0, b"data"),
    b"FORM": _Layout(12, 4, 4, "big", 2, 0, b"SSND"),
    b"caff": _Layout(8, 4, 8, "big", 1, 0, b"data"),
    b"riff": _W64,
}


def complete_length(file: MediaFile, what: str) -> None:
    """Correct the header of `file` if it states a placeholder; `what` names the file in errors.

    Raises InputError if the file is truncated or holds several recordings.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    length = _find(file, head, size, what)
    if _is_joined(file, head[:4], length):
        raise InputError(f"{what}: it holds several recordings, one after the other; split it and pass them one by one")
    file.seek(0)
    if length is None or (present := size - length.start) < 0:
        return
    # If the header states the correct length of the whole file, zero is true: an empty recording.
    if length.stated == 0 and int.from_bytes(head[4:8], length.order) + 8 == size:
        return
    if is_placeholder(length.stated):
        if (field := present + length.counted) >= 1 << 8 * length.width:
            raise InputError(f"{what}: it holds more sound than its header can state; convert it to FLAC")
        file.mend(length.at, field.to_bytes(length.width, length.order))
    elif present < length.stated:
        raise InputError(f"{what}: cut short, {present} of {length.stated} bytes of sound are there")


def _is_joined(file: MediaFile, magic: bytes, length: _Length | None) -> bool:
    """Whether a second recording with its own header follows, which decoders would drop silently."""
    if length is not None:
        file.seek(length.start + length.stated)
        return magic in file.read(5)  # with padding to an even length
    file.seek(_FIRST_HEADERS)
    beginning, block = _BEGINNINGS.get(magic), b""
    while beginning and (more := file.read(1 << 20)):
        block = block[-8:] + more
        if beginning in block:
            return True
    return False


def is_placeholder(length: int) -> bool:
    """Whether a stated length in bytes is a placeholder of a writer that did not know it, by the module's rule."""
    above = 1 << length.bit_length()
    near_power = min(above - length, length - above // 2) <= _POWER_SLACK
    near_round = min(length % _ROUND, -length % _ROUND) <= _ROUND_SLACK
    return length == 0 or length >= _ROUND - _ROUND_SLACK and (near_power or near_round)


def _find(file: MediaFile, head: bytes, size: int, what: str) -> _Length | None:
    """The stated length of the sound in a file that begins with `head`; None for other kinds of files."""
    if head.startswith(b".snd") and len(head) == 12:
        start, stated = (int.from_bytes(head[i : i + 4], "big") for i in (4, 8))
        return _Length(8, 4, "big", stated, start)
    layout = _LAYOUTS.get(head[:4])
    if layout is None or head[:4] in (b"RIFF", b"RIFX") and head[8:] != b"WAVE":
        return None
    wide = None  # position of the 64-bit field, which WAV has in a separate chunk
    for number, (name, at, stated) in enumerate(_chunks(file, layout, size)):
        if number == MAX_CHUNKS:
            raise InputError(f"{what}: more than {MAX_CHUNKS} chunks precede the sound; convert it to FLAC")
        if name == b"ds64":
            wide = at + 12  # after the lengths of this chunk and of the whole file
        if name == layout.sound:
            start = at + layout.length_bytes
            if wide and stated == 0xFFFFFFFF:
                file.seek(wide)
                return _Length(wide, 8, "little", int.from_bytes(file.read(8), "little"), start)
            stated = max(stated - layout.counted, 0)
            return _Length(at, layout.length_bytes, layout.order, stated, start, layout.counted)
    return None


def _chunks(file: MediaFile, layout: _Layout, size: int) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a file: name, position of the length field, and length."""
    at, header_bytes = layout.first, layout.name_bytes + layout.length_bytes
    while at + header_bytes <= size:
        file.seek(at)
        header = file.read(header_bytes)
        length = int.from_bytes(header[layout.name_bytes :], layout.order)
        yield header[: layout.name_bytes], at + layout.name_bytes, length
        at += header_bytes + max(length - layout.counted, 0)
        at += -at % layout.align
