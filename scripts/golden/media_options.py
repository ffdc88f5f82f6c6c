"""Write tests/data/golden_media_options.json: results of the official utilities for media options, on a grid of values.

They need torchvision, which has no build for CPU-only torch, and many packages that this project does not use, so the
tests do not depend on them. Install both without their dependencies and run this once:

    pip install --no-deps torchvision qwen-omni-utils audioread
    python -m scripts.golden.media_options

They are called with this model's patch size. Videos are described instead of decoded: the utilities' own functions find
the span and the number of frames, and resizing returns an empty array of the requested size. The grids are those that
transformers' processors compute from the result, without resizing a second time.
"""

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
PATCH_SIZE = 16
AREA = 32 * 32  # pixels of a token
PICTURES = ((48, 64), (640, 427), (700, 1000), (1100, 260))
PICTURE_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"max_pixels": 64 * AREA},
    {"min_pixels": 300 * AREA},
    {"min_pixels": 16 * AREA, "max_pixels": 100 * AREA},
    {"max_pixels": 360 * 420},
    {"max_pixels": 5 * AREA},
    {"resized_height": 280, "resized_width": 420},
    {"resized_height": 10, "resized_width": 500},
    {"resized_height": 70, "resized_width": 70, "max_pixels": 4 * AREA},
    {"max_pixels": 2 * AREA},
)
# Frames, frames per second, height, width.
VIDEOS = ((53, 25.0, 180, 320), (250, 30.0, 270, 480), (9, 12.5, 600, 200), (1203, 24.0, 360, 640), (3, 30.0, 64, 64))
VIDEO_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"fps": 1.0},
    {"fps": 5},
    {"nframes": 8},
    {"nframes": 5},
    {"nframes": 3},
    {"nframes": 400},
    {"fps": 0.5, "min_frames": 7},
    {"fps": 4.0, "max_frames": 9},
    {"max_frames": 6, "min_frames": 2},
    {"min_pixels": 16 * AREA, "max_pixels": 64 * AREA},
    {"max_pixels": 200 * AREA},
    {"max_pixels": 64 * AREA},
    {"min_pixels": 4 * AREA, "total_pixels": 500 * AREA},
    {"total_pixels": 2048 * AREA, "nframes": 6},
    {"min_pixels": 400 * AREA, "total_pixels": 300 * AREA},
    {"min_pixels": 5 * AREA, "total_pixels": 3 * AREA},
    {"resized_height": 280, "resized_width": 280},
    {"video_start": 0.5, "video_end": 1.7},
    {"video_start": 0.21, "nframes": 4},
    {"video_end": 1.0, "fps": 3.0, "max_pixels": 150 * AREA},
    {"video_start": 99.0},
)
# Frames, height, width.
LISTS = ((4, 240, 320), (7, 500, 300))
LIST_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"sample_fps": 4.0},
    {"min_pixels": 64 * AREA, "max_pixels": 256 * AREA},
    {"resized_height": 224, "resized_width": 448},
    {"total_pixels": 600 * AREA, "min_pixels": 32 * AREA},
)
SPANS = ((0.0, 0.5), (0.1, 0.7), (0.3, 0.7), (0.3, None), (0.251, 1.013), (0.0, 9.0))


def load_utilities() -> Any:
    """The utilities' module for pictures and videos, whose videos are "frames fps height width"."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from qwen_omni_utils.v2_5 import vision_process  # pyright: ignore[reportMissingImports]

    def read(part: dict) -> tuple:
        total, fps, height, width = (float(word) for word in part["video"].split())
        first, last, count = vision_process.calculate_video_frame_range(part, int(total), fps)
        n = vision_process.smart_nframes(part, total_frames=count, video_fps=fps)
        indices = torch.linspace(first, last, n).round().long().tolist()
        video = torch.zeros(()).expand(n, 3, int(height), int(width))
        return video, {"frames_indices": indices}, n / max(count, 1e-6) * fps

    # All three, because the utilities try the last one where the first fails.
    vision_process.VIDEO_READER_BACKENDS |= dict.fromkeys(("torchvision", "decord", "torchcodec"), read)

    def resized(video: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
        return torch.zeros(()).expand(len(video), 3, *size)

    vision_process.transforms.functional.resize = resized
    return vision_process


def picture_row(utilities: Any, shape: tuple[int, int], options: dict[str, Any]) -> dict[str, Any]:
    """One picture: the size that it gets, None if the utilities refuse."""
    from PIL import Image

    part = {"image": Image.new("RGB", (shape[1], shape[0])), **options}
    try:
        size = utilities.fetch_image(part, image_patch_size=PATCH_SIZE).size[::-1]
    except (ValueError, AssertionError):
        size = None
    return {"shape": shape, "options": options, "size": size}


def video_row(utilities: Any, video: Any, what: Any, options: dict[str, Any], processor: Any) -> dict[str, Any]:
    """One video: frames taken, their number and size, rate and grid; the latter None if the utilities refuse."""
    part, row = {"video": video, **options}, {"video": what, "options": options}
    try:
        (frames, metadata), fps = utilities.fetch_video(part, PATCH_SIZE, True, True)
    except (ValueError, AssertionError):
        return row | {"size": None}
    n, _, height, width = frames.shape
    grid = [-(-n // 2), height // PATCH_SIZE, width // PATCH_SIZE]
    if n * height * width < 2**23:  # enough of them go through the processor
        made = processor([frames.numpy()], do_resize=False, do_sample_frames=False, return_tensors="np")
        if made["video_grid_thw"][0].tolist() != grid:
            raise RuntimeError("the reference no longer cuts frames as it did")
    return row | {"size": [height, width], "count": n, "frames": metadata["frames_indices"], "fps": fps, "grid": grid}


def sound_rows() -> list[dict[str, Any]]:
    """Samples at 16 kHz that spans of an array and of files at three rates have."""
    import soundfile
    from qwen_omni_utils.v2_5.audio_process import process_audio_info  # pyright: ignore[reportMissingImports]

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rate, (start, end) in product((None, 8_000, 16_000, 44_100), SPANS):
            samples = np.random.default_rng(0).normal(0, 0.1, round(1.3 * (rate or 16_000))).astype(np.float32)
            sound: Any = samples
            if rate is not None:
                sound = f"{folder}/{rate}.wav"
                soundfile.write(sound, samples, rate, subtype="FLOAT")
            part = {"type": "audio", "audio": sound, "audio_start": start, "audio_end": end}
            (heard,) = process_audio_info([{"role": "user", "content": [part]}], False)
            rows.append({"rate": rate, "start": start, "end": end, "samples": len(heard)})
    return rows


def main() -> None:
    """Run the utilities over all grids and store the results."""
    from PIL import Image

    utilities = load_utilities()
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    settings = json.loads((DATA / "public_preprocessor_config.json").read_text())
    processor = Qwen2VLVideoProcessor(**{name: value for name, value in settings.items() if not name.endswith("type")})
    videos, lists = [], []
    for video, options in product(VIDEOS, VIDEO_OPTIONS):
        videos.append(video_row(utilities, " ".join(map(str, video)), video, options, processor))
    for (count, height, width), options in product(LISTS, LIST_OPTIONS):
        frames = [Image.new("RGB", (width, height))] * count
        lists.append(video_row(utilities, frames, (count, height, width), options, processor))
    tables = {
        "pictures": [picture_row(utilities, *case) for case in product(PICTURES, PICTURE_OPTIONS)],
        "videos": videos,
        "lists": lists,
        "sounds": sound_rows(),
    }
    lines = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in tables.items()
    )
    (DATA / "golden_media_options.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.golden.media_options", description=__doc__)
