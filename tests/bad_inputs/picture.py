"""Pictures: files that are none, cut, damaged or claim too much, and arrays and objects that are no picture."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.inputs.image import load_image
from tests.bad_inputs.case import Case

DATA = Path(__file__).resolve().parent.parent / "data"


def _encoded(kind: str, size: tuple[int, int] = (96, 64), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(data, kind)
    return data.getvalue()


def _png(width: int, height: int, bits: int = 8, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _jpeg(width: int, height: int) -> bytes:
    """A JPEG of a few hundred bytes that claims a size."""
    data = bytearray(_encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _file(name: str, data: bytes, *words: str) -> Case:
    def act(folder: Path, _: Any) -> None:
        (folder / "a.bin").write_bytes(data)
        load_image(folder / "a.bin")

    return Case(f"picture: {name}", act, ("a.bin", *words), InputError)


def _value(name: str, value: Any, *words: str) -> Case:
    return Case(f"picture: {name}", lambda *_: load_image(value), ("image", *words), InputError)


def _closed() -> Image.Image:
    picture = Image.open(DATA / "chelsea.png")
    picture.close()
    return picture


def _strided(*shape: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), shape, (0,) * len(shape))


CASES = [
    _file("empty", b"", "it is empty"),
    _file("text", b"no picture at all", "cannot be read", "pass JPEG, PNG or WebP"),
    _file("a sound", (DATA / "cover.mp3").read_bytes(), "cannot be read", "pass JPEG, PNG or WebP"),
    _file("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    _file("SVG", b"<?xml version='1.0'?><svg/>", "pass JPEG, PNG or WebP"),
    _file("JPEG cut short", _encoded("JPEG")[:-300], "damaged or cut short"),
    _file("JPEG that claims 9400 x 9400", _jpeg(9400, 9400), "bytes cannot hold 9400 x 9400 pixels"),
    _file("JPEG that claims 65,500 x 65,500", _jpeg(65_500, 65_500), "too many pixels", "make it smaller"),
    _file("JPEG of 300 scans", _encoded("JPEG")[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 300, "100 scans"),
    _file("PNG cut short", _encoded("PNG")[:-60], "damaged or cut short"),
    _file("PNG without pixels", _png(64, 64), "damaged or cut short"),
    _file("PNG with too few pixels", _png(64, 64, pixels=zlib.compress(bytes(999))), "damaged or cut short"),
    _file("PNG of 0 x 0", _png(0, 0), "image"),
    _file("PNG of 30,000 x 30,000", _png(30_000, 30_000), "too many pixels"),
    _file("PNG of 9,500 x 9,500", _png(9_500, 9_500), "more than 89478485 pixels", "make it smaller"),
    _file("PNG of 2^31 columns", _png(2**31 - 1, 1), "image"),
    _file("PNG of 3 bits", _png(64, 64, bits=3), "cannot be read"),
    _file("a strip", _png(1, 100_000), "one side is more than 200 times the other", "crop"),
    _file("GIF cut short", _encoded("GIF")[:-100], "damaged or cut short"),
    _file("WebP cut short", _encoded("WEBP")[:-20], "image"),
    _file("AVIF cut short", _encoded("AVIF")[:-20], "damaged or cut short"),
    _file("AVIF of noughts", _encoded("AVIF").split(b"mdat")[0] + b"mdat" + bytes(999), "damaged or cut short"),
    _file("TIFF cut short", _encoded("TIFF")[:-9000], "image"),
    _file("TIFF without a directory", b"II*\0\xff\xff\xff\xff", "cannot be read"),
    _file("BMP cut short", _encoded("BMP")[:-9000], "damaged or cut short"),
    _file("JPEG 2000 cut short", _encoded("JPEG2000")[:-100], "damaged or cut short"),
    _file("PPM of words", b"P6\nwide high 255\n", "cannot be read"),
    _file("32 bits a pixel", _encoded("TIFF", mode="F"), "32-bit pixels", "8 bits"),
    Case("picture: /dev/zero", lambda *_: load_image("/dev/zero"), ("not a regular file",)),
    Case("picture: memory of a process", lambda *_: load_image("/proc/self/mem"), ("cannot be read",)),
    Case("picture: an address", lambda *_: load_image("https://a.org/12:30.png"), ("is a URL", "local path")),
    Case("picture: a name with a colon", lambda *_: load_image("note:12.png"), ("no such file",)),
    Case("picture: a directory", lambda folder, _: load_image(folder), ("not a regular file",)),
    _value("None", None, "NoneType", "pass a path"),
    _value("a list", [[1, 2], [3, 4]], "of type list", "pass a path"),
    _value("a picture that was closed", _closed(), "damaged or cut short"),
    _value("floats", np.zeros((8, 8, 3)), "np.uint8"),
    _value("channels first", np.zeros((3, 8, 8), np.uint8), "[H, W, 3]"),
    _value("four channels", np.zeros((8, 8, 4), np.uint8), "[H, W, 3]"),
    _value("no axes", np.zeros((), np.uint8), "[H, W, 3]"),
    _value("no pixels", np.zeros((0, 8, 3), np.uint8), "it is empty"),
    _value("10^11 pixels that are one", _strided(10**6, 10**5, 3), "more than 89478485 pixels"),
    _value("objects", np.zeros((8, 8, 3), object), "dtype object"),
]  # fmt: skip
