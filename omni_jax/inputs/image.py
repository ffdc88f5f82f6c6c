"""Pictures: from a file to rows of patches for the vision encoder.

Data flow: `load_image` gives upright RGB; `patchify_image` resizes it to whole merged tokens, normalises it and cuts it
into rows in the order in which the encoder merges 2 x 2 patches. `video` uses the same steps for its frames.

Source: transformers `load_image` (rotation), `convert_to_rgb` (transparency over white), `Qwen2VLImageProcessorPil`
(resizing by PIL bicubic, exact); qwen-omni-utils agrees with both. Deliberate differences: 16-bit greys are scaled to
8 bits, where PIL alone clips them to white; nothing is fetched; and sizes are limited before anything is decoded.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.settings import CHANNELS, ImageSettings
from omni_jax.inputs.source import Source, is_source, name_of, open_source, reading

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485  # of a decoded picture: PIL's own threshold for a suspected decompression bomb
MAX_ASPECT = 200

# Not PIL's whole list: some of its readers start other programs (EPS) or hold no picture of their own.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(source: "Source | np.ndarray | Image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Load a picture as upright RGB, uint8 [H, W, 3]: from a path, bytes, a PIL image or such an array.

    Transparent pixels are laid over white. Raises InputError for what cannot be read, is damaged, or has more than
    `max_pixels` pixels or an aspect above 200.
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
    with open_source(source, "image") as file:
        try:
            Image.init()
            picture = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        except Image.DecompressionBombError as error:
            raise InputError(f"image {name_of(source)}: too many pixels ({error}); make it smaller") from None
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise InputError(f"image {name_of(source)}: cannot be read ({error}); pass JPEG, PNG or WebP") from None
        _check_size(*picture.size, max_pixels, source)
        return _decode(picture, source)


def image_shape(source: Any) -> tuple[int, int] | None:
    """The (height, width) of a picture before it is turned upright, from its header; None if it cannot be read."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        return (source.shape[0], source.shape[1]) if source.ndim == 3 and source.size else None
    if isinstance(source, Image.Image):
        return source.height, source.width
    try:
        with open_source(source, "image") as file, reading(source, "image"):
            Image.init()
            picture = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
            return picture.height, picture.width
    except InputError:
        return None  # `load_image` says why


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
        raise InputError(f"{what} is longer than {MAX_ASPECT} times its width; crop or tile it")


def _decode(picture: "Image", source: object) -> np.ndarray:
    """A PIL image as upright RGB, uint8 [H, W, 3]; this is where its pixels are read."""
    from PIL import ImageOps

    try:
        picture = ImageOps.exif_transpose(picture)
        return np.array(_to_rgb(picture), np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise InputError(f"image {name_of(source)}: damaged or cut short ({error})") from None


def _to_rgb(picture: "Image") -> "Image":
    from PIL import Image

    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.array(picture, np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; save it with 8 bits a channel")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, an area within the limits, and about the same aspect."""
    factor, area = settings.factor, height * width
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"a picture of {width} x {height} is longer than {MAX_ASPECT} times its width; crop or tile it"
        )
    rows, columns = round(height / factor), round(width / factor)  # Python's rounding: halves to even
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
