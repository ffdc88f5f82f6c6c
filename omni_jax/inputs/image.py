"""Pictures: from a file to rows of patches for the vision encoder.

Data flow: `load_image` gives upright RGB; `patchify_image` resizes it to whole merged tokens, normalises it and cuts it
into rows in the order in which the encoder merges 2 x 2 patches. `video` uses the same steps for its frames.

Source: transformers `load_image` (rotation), `convert_to_rgb` (transparency over white), `Qwen2VLImageProcessorPil`
(resizing by PIL bicubic, exact); qwen-omni-utils agrees with both. Deliberate differences: 16-bit greys are scaled to
8 bits, where PIL alone clips them to white; nothing is fetched; and sizes are limited before anything is decoded.
"""

import io
import math
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.settings import CHANNELS, ImageSettings
from omni_jax.inputs.source import MediaFile, Source, is_source, name_of, open_source, reading

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 89_478_485  # of a decoded picture: PIL's own threshold for a suspected decompression bomb
MAX_ASPECT = 200
MAX_JPEG_PIXELS_PER_BYTE = 512  # a JPEG spends at least a bit on each block of 8 x 8
MAX_JPEG_SCANS = 100  # each takes time for all pixels; progressive pictures have about ten
STRIP_PIXELS = 1 << 22  # converted at a time, so that a picture is held twice, once with PIL and once as an array

# Not PIL's whole list: some of its readers start other programs (EPS) or hold no picture of their own.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Of a part of a JPEG; in a scan, 0 or a restart follows each 0xff. No "+" after the first byte: it would take quadratic
# time for a file that ends in many of them.
_MARKER = re.compile(rb"\xff([^\0\xff\xd0-\xd7])")
_ORIENTATION = 0x0112  # of EXIF; 1 is upright


def load_image(source: "Source | np.ndarray | Image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Load a picture as upright RGB, uint8 [H, W, 3]: from a path, bytes, a PIL image or such an array.

    Transparent pixels are laid over white; of an animation, the first picture counts. Raises InputError for what cannot
    be read, is damaged, or has more than `max_pixels` pixels or an aspect above 200.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        image = _check_array(source)
        _check_size(image.shape[1], image.shape[0], max_pixels, source)
        return image
    if isinstance(source, Image.Image):
        _check_size(*source.size, max_pixels, source)
        return _decode(source, source)
    if not is_source(source):
        raise InputError(f"image {name_of(source)}: pass a path, bytes, a PIL image or a NumPy array uint8 [H, W, 3]")
    with open_source(source, "image") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PIL warns of is an error here, or concerns tags
        return _decode(_open(file, source, max_pixels), source)


def _open(file: MediaFile, source: Source, max_pixels: int) -> "ImageFile":
    """The picture in a file, of which PIL has read the header, and whose size is accepted."""
    from PIL import Image, UnidentifiedImageError

    what = f"image {name_of(source)}"
    head, size = file.read(64), file.seek(0, io.SEEK_END)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head:
        _add_heif(what)
    with reading(source, "image", "cannot be read"):
        Image.init()
        try:
            picture = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        except Image.DecompressionBombError:
            raise InputError(f"{what}: too many pixels; make it smaller") from None
        except UnidentifiedImageError:
            raise InputError(f"{what}: cannot be read; pass JPEG, PNG or WebP") from None
    width, height = picture.size
    _check_size(width, height, max_pixels, source)
    if picture.format in ("JPEG", "MPO"):
        if width * height > MAX_JPEG_PIXELS_PER_BYTE * size:
            raise InputError(f"{what}: damaged or cut short, {size} bytes cannot hold {width} x {height} pixels")
        file.seek(0)
        if _has_many_scans(file.read(1 << 26)):
            raise InputError(f"{what}: a JPEG of more than {MAX_JPEG_SCANS} scans; save it again")
    return picture


def _has_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more than MAX_JPEG_SCANS; what its headers hold and what follows its end is not looked at."""
    at = count = 0
    while count <= MAX_JPEG_SCANS and (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        at, count = found.end(), count + (found[1] == b"\xda")
        if found[1] not in (b"\xd8", b"\x01"):  # these have no length
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    return count > MAX_JPEG_SCANS


def _add_heif(what: str) -> None:
    """Let PIL read the pictures of telephones."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{what}: a HEIC picture, which only pillow-heif reads: pip install 'omni_jax[heif]', or save it as JPEG"
        ) from None
    register_heif_opener()


def image_shape(source: "Source | np.ndarray | Image") -> tuple[int, int]:
    """The (height, width) of a picture before it is turned upright, from its header; errors as of `load_image`."""
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, MAX_PIXELS, source)
        return source.height, source.width
    if not isinstance(source, Source):
        height, width, _ = load_image(source).shape
        return height, width
    with open_source(source, "image") as file:
        picture = _open(file, source, MAX_PIXELS)
        return picture.height, picture.width


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise InputError(
            f"image array of dtype {image.dtype}; pass uint8: for floats of 0 to 1, np.uint8(np.round(image * 255))"
        )
    if image.ndim != 3 or image.shape[2] != CHANNELS:
        raise InputError(f"image array of shape {image.shape}; pass uint8 [H, W, 3]")
    return image


def _check_size(width: int, height: int, max_pixels: int, source: object) -> None:
    what = f"image {name_of(source)}: {width} x {height}"
    if width < 1 or height < 1:
        raise InputError(f"{what} pixels; it is empty")
    if width * height > max_pixels:
        raise InputError(f"{what} is more than {max_pixels} pixels; make it smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{what}: one side is more than {MAX_ASPECT} times the other; crop or tile it")


def _decode(picture: "Image", source: object) -> np.ndarray:
    """A PIL image as upright RGB, uint8 [H, W, 3]; this is where its pixels are read."""
    from PIL import ImageOps

    if picture.mode in ("I", "F"):
        raise InputError(f"image {name_of(source)}: 32-bit pixels have no agreed range; save it with 8 bits a channel")
    with reading(source, "image", "damaged or cut short"):
        if picture.getexif().get(_ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        picture.load()
        width, height = picture.size
        pixels, rows = np.empty((height, width, CHANNELS), np.uint8), max(STRIP_PIXELS // width, 1)
        for top in range(0, height, rows):
            strip = picture.crop((0, top, width, min(top + rows, height)))
            pixels[top : top + rows] = np.asarray(_to_rgb(strip))
        return pixels


def _to_rgb(picture: "Image") -> "Image":
    from PIL import Image

    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.array(picture, np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def smart_resize(height: int, width: int, settings: ImageSettings, fewest: int = 0) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, an area within the limits, and about the same aspect.

    fewest: what sides are rounded to at least, in factors, before the area is looked at: 1 in the official utilities.
    """
    factor, area = settings.factor, height * width
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"a picture of {width} x {height}: one side is more than {MAX_ASPECT} times the other; crop or tile it"
        )
    # Python's rounding: halves to even.
    rows, columns = (max(fewest, round(side / factor)) for side in (height, width))
    if rows * columns * factor**2 > settings.max_pixels:
        shrink = math.sqrt(area / settings.max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / area)
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def fit(image: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Resize uint8 [H, W, 3] to whole merged tokens."""
    return resize(image, *smart_resize(image.shape[0], image.shape[1], settings))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to uint8 [height, width, 3], bicubic."""
    from PIL import Image

    if (height, width) == image.shape[:2]:
        return image
    return np.array(Image.fromarray(image).resize((width, height), resample=Image.Resampling.BICUBIC))


def patchify_image(image: np.ndarray, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut uint8 [H, W, 3] into patches float32 [P, patch_dim]; also returns the grid (1, height, width) in patches."""
    resized = fit(_check_array(image), settings)
    return patchify_frames(np.broadcast_to(resized, (settings.temporal_patch_size, *resized.shape)), settings)


def patchify_frames(frames: np.ndarray, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut resized frames uint8 [t * T, H, W, 3] into patches float32 [t * h * w, patch_dim] and their grid (t, h, w).

    Rows run over (t, h / m, w / m, m, m), so that each run of m * m rows is one merged token; a row's values run over
    (channel, frame, height, width).
    """
    T, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    t, h, w = frames.shape[0] // T, frames.shape[1] // p, frames.shape[2] // p
    blocks = frames.reshape(t, T, h // m, m, p, w // m, m, p, CHANNELS)
    rows = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, CHANNELS, -1)
    return _normalise(rows, settings).reshape(t * h * w, settings.patch_dim), (t, h, w)


def _normalise(rows: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [rows, 3, n] as float32 (x / 255 - mean) / std: a look-up, as there are only 256 values a channel."""
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    out = np.empty(rows.shape, np.float32)
    for channel in range(CHANNELS):
        table = (values - np.float32(settings.mean[channel])) / np.float32(settings.std[channel])
        out[:, channel] = table[rows[:, channel]]
    return out
