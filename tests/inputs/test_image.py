"""Pictures: patches equal to transformers' PIL processor, upright RGB from every mode, and named errors."""

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from omni_jax.errors import ConfigError, InputError
from omni_jax.inputs import image
from omni_jax.inputs.image import load_image, patchify_image, smart_resize
from omni_jax.inputs.settings import ImageSettings


@pytest.fixture(scope="module")
def public(data_dir: Path) -> dict:
    return json.loads((data_dir / "public_preprocessor_config.json").read_text())


@pytest.fixture(scope="module")
def china(data_dir: Path) -> Image.Image:
    return Image.open(data_dir / "china.jpg").convert("RGB")


def hf_processor(values: dict):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.Qwen2VLImageProcessorPil(**{k: v for k, v in values.items() if not k.endswith("type")})


ODD = {  # no value as in the public settings
    "patch_size": 14, "merge_size": 3, "temporal_patch_size": 3, "min_pixels": 5000, "max_pixels": 90_000,
    "image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.27, 0.28],
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, ODD], ids=["public", "odd"])
@pytest.mark.parametrize(
    "size", [(640, 427), (1, 1), (3, 5), (31, 33), (48, 48), (600, 3), (2, 400), (16, 1000), (1024, 32)]
)
def test_patches_equal_the_reference(public, china, changes, size):
    values, picture = public | changes, china.resize(size)
    expected = hf_processor(values)(picture, return_tensors="np")
    patches, grid = patchify_image(load_image(picture), ImageSettings.from_hf(values))
    assert grid == tuple(expected["image_grid_thw"][0])
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(patches, expected["pixel_values"])


def test_a_picture_over_the_limit_is_made_smaller(public, data_dir):
    values = public | {"max_pixels": 50_000}
    path = data_dir / "flower.jpg"
    expected = hf_processor(values)(Image.open(path), return_tensors="np")
    patches, grid = patchify_image(load_image(path), ImageSettings.from_hf(values))
    assert grid == tuple(expected["image_grid_thw"][0]) and grid[1] * grid[2] * 16**2 <= 50_000
    np.testing.assert_array_equal(patches, expected["pixel_values"])


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    patch=st.sampled_from([14, 16]),
    limits=st.sampled_from([(3136, 12845056), (131072, 786432), (5000, 9000)]),
)
def test_sizes_equal_the_reference(height, width, patch, limits):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    ours = ImageSettings(*limits, patch, 2, 2, (0.5,) * 3, (0.5,) * 3)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="200 times"):
            smart_resize(height, width, ours)
    else:
        assert smart_resize(height, width, ours) == module.smart_resize(height, width, 2 * patch, *limits)


@pytest.mark.parametrize(
    "height, width, rounded, otherwise",
    [
        (73, 127, (64, 128), (64, 96)),  # 9,271 pixels are over the limit, 8,192 once rounded are not
        (48, 145, (32, 160), (64, 160)),  # 6,960 are within it, 10,240 are not
        (32, 112, (32, 128), (64, 128)),  # 3,584 are too few, 4,096 are not
        (37, 111, (64, 128), (32, 96)),  # 4,107 suffice, 3,072 do not
    ],
)
def test_the_limits_hold_for_the_rounded_size(height, width, rounded, otherwise):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    limits = 4 * 1024, 9 * 1024
    size = smart_resize(height, width, ImageSettings(*limits, 16, 2, 2, (0.5,) * 3, (0.5,) * 3))
    assert size == module.smart_resize(height, width, 32, *limits) == rounded != otherwise


def test_patches_are_bounded_and_repeat_the_frame(public, china):
    patches, _ = patchify_image(load_image(china), ImageSettings.from_hf(public))
    assert patches.min() >= -1 and patches.max() <= 1
    frames = patches.reshape(len(patches), 3, 2, 16, 16)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr"])
def test_every_mode_becomes_rgb_as_in_the_reference(china, mode):
    convert_to_rgb = pytest.importorskip("transformers.image_transforms").convert_to_rgb
    picture = china.resize((40, 30)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.linear_gradient("L").resize((40, 30)))
    np.testing.assert_array_equal(load_image(picture), convert_to_rgb(picture, return_numpy=True))


def test_a_transparent_palette_lies_over_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 0)
    data = io.BytesIO()
    picture.save(data, "PNG", transparency=0)
    pixels = load_image(data.getvalue())
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = io.BytesIO()
    Image.fromarray(grey).save(data, "PNG")
    np.testing.assert_array_equal(load_image(data.getvalue()), np.repeat((grey >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(china, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    china.resize((64, 32)).save(data, "JPEG", exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(data)))
    pixels = load_image(data.getvalue())
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.shape[:2] == ((64, 32) if orientation > 4 else (32, 64))


def test_path_bytes_picture_and_array_agree(data_dir):
    path = data_dir / "chelsea.png"
    pixels = load_image(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (300, 451, 3)
    for source in (str(path), path.read_bytes(), memoryview(path.read_bytes()), Image.open(path), pixels):
        np.testing.assert_array_equal(load_image(source), pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def encoded(picture: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind)
    return data.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A JPEG of a few hundred bytes that claims a size."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


BAD = {
    "url": ("https://example.com/a.png", "is a URL"),
    "file url": ("file:///etc/hostname", "is a URL"),
    "data url": ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
    "missing": ("no/such/picture.png", "no such file"),
    "directory": (Path(__file__).parent, "not a regular file"),
    "device": ("/dev/zero", "not a regular file"),
    "null byte": ("a\0b.png", "null character"),
    "empty": (b"", "is empty"),
    "text": (b"this is not a picture at all", "cannot be read"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "drawing": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read; pass JPEG, PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    "bomb": (png_header(30_000, 30_000), "too many pixels"),
    "large": (png_header(10_000, 9_999), "more than 89478485 pixels"),
    "strip": (png_header(1, 100_000), "200 times"),
    "no pixels": (png_header(64, 64), "damaged or cut short"),
    "jpeg that claims much": (claiming(9400, 9400), "bytes cannot hold 9400 x 9400 pixels"),
    "none": (None, "pass a path"),
    "list": ([[1, 2], [3, 4]], "pass a path"),
    "floats": (np.zeros((8, 8, 3)), "np.uint8"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), "H, W, 3"),
    "grey array": (np.zeros((8, 8), np.uint8), "H, W, 3"),
    "empty array": (np.zeros((0, 8, 3), np.uint8), "it is empty"),
    "float picture": (Image.new("F", (8, 8)), "32-bit pixels"),
    "strip picture": (Image.new("RGB", (2010, 10)), "200 times"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_have_named_errors(case):
    source, message = BAD[case]
    with pytest.raises(InputError, match=message):
        load_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_files_are_refused(china, kind):
    data = encoded(china.resize((200, 150)), kind)
    assert load_image(data).shape == (150, 200, 3)
    with pytest.raises(InputError, match="damaged or cut short|cannot be read"):
        load_image(data[: len(data) // 2])


def test_a_flat_picture_is_no_bomb():
    flat = Image.new("L", (4000, 3000), 200)
    for kind in ("JPEG", "PNG"):
        assert load_image(encoded(flat, kind)).shape == (3000, 4000, 3)


def test_only_scans_of_a_jpeg_are_counted(china):
    """Not what a video appended by a telephone, a preview in a header or a second picture looks like."""
    many, scan = b"\xff\xda" * 200, b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\0\0"
    plain = encoded(china, "JPEG")
    headed = plain[:2] + b"\xff\xe9" + (len(many) + 2).to_bytes(2, "big") + many + plain[2:]
    np.testing.assert_array_equal(load_image(headed + b"\0\0\0\x18ftypmp42" + many), load_image(plain))
    assert not image._has_many_scans(plain[:-2] + scan * 99 + plain[-2:])
    with pytest.raises(InputError, match="more than 100 scans; save it again"):  # and its own
        load_image(plain[:-2] + scan * 100 + plain[-2:])


def test_a_tail_of_erased_bytes_costs_no_more_than_its_length():
    data = encoded(Image.effect_noise((64, 64), 90), "JPEG")
    with pytest.raises(InputError, match="damaged|cut short|cannot be read"):
        load_image(data[: len(data) // 2] + b"\xff" * 3_000_000)


def test_a_large_picture_is_converted_in_strips(monkeypatch, data_dir):
    whole = [load_image(data_dir / name) for name in ("china.jpg", "chelsea.png")]
    monkeypatch.setattr(image, "STRIP_PIXELS", 5000)
    for pixels, name in zip(whole, ("china.jpg", "chelsea.png"), strict=True):
        np.testing.assert_array_equal(load_image(data_dir / name), pixels)


def test_a_picture_of_a_telephone_needs_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match="a HEIC picture.* pip install 'omni_jax.heif.'"):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_a_picture_of_a_telephone_is_read_upright(china):
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    china.resize((64, 32)).save(data, "HEIF", quality=95, exif=exif.tobytes())
    pixels = load_image(data.getvalue())
    expected = np.rot90(np.array(china.resize((64, 32))), -1)
    assert pixels.shape == (64, 32, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 8


def test_the_pixel_limit_can_be_set(china):
    with pytest.raises(InputError, match="more than 1000 pixels"):
        load_image(china, max_pixels=1000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size": None}, "patch_size"),
        ({"merge_size": 0}, "not a positive count"),
        ({"image_mean": [0.5]}, "not 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "not 3 numbers from 0.01"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "resample"),
    ],
)
def test_unusable_settings_are_refused(public, change, message):
    with pytest.raises(ConfigError, match=message):
        ImageSettings.from_hf(public | change)


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "patch_size", "image_mean", "temporal_patch_size"])
def test_a_missing_setting_is_named(public, name):
    with pytest.raises(ConfigError, match=f"'{name}' is missing"):
        ImageSettings.from_hf({k: v for k, v in public.items() if k != name})
