"""The font that Pillow brings, for tests that set letters and need no package of fonts."""

import io
from pathlib import Path

from PIL import ImageFont


def plain_font(size: float) -> ImageFont.FreeTypeFont:
    """The font in a size."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def write_font(folder: Path) -> Path:
    """Write the file of the font into a folder: the file."""
    content = plain_font(24).path
    assert isinstance(content, io.BytesIO)
    path = folder / "plain.ttf"
    path.write_bytes(content.getvalue())
    return path
