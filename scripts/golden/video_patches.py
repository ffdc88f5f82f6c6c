"""Write tests/data/golden_video_patches.npz: the patches of two small videos by transformers' Qwen2VLVideoProcessor.

It needs torchvision, which has no build for CPU-only torch, so the tests do not depend on it. Install it without its
dependencies and run this once:

    pip install --no-deps torchvision
    python -m scripts.golden.video_patches

Two cases: "exact", frames that already have the final size, and "resized", an odd number of frames of another size.
Every eleventh row of each is kept, as bytes: the reference resizes and rounds before it normalises.
"""

import json
from pathlib import Path

import numpy as np
import torch
import tyro

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
ROW_STEP = 11


def shifted_crops(image: np.ndarray, count: int, height: int, width: int) -> np.ndarray:
    """A camera that pans over a picture: uint8 [count, height, width, 3]."""
    return np.stack([image[20 + 7 * i : 20 + 7 * i + height, 30 + 11 * i : 30 + 11 * i + width] for i in range(count)])


def main() -> None:
    """Process both cases and store the grids and every eleventh row of patches."""
    # torchvision's own operators are not loaded; importing it requires only that two of them are declared.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from PIL import Image
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

    settings = json.loads((DATA / "public_preprocessor_config.json").read_text())
    processor = Qwen2VLVideoProcessor(**{name: value for name, value in settings.items() if not name.endswith("type")})
    image = np.array(Image.open(DATA / "china.jpg"))
    arrays = {}
    for name, (count, height, width) in {"exact": (2, 256, 512), "resized": (3, 180, 320)}.items():
        frames = shifted_crops(image, count, height, width)
        out = processor([frames], size=Qwen3OmniMoeProcessor.videos_kwargs.get("size"), return_tensors="np")
        pixels = (out["pixel_values_videos"][::ROW_STEP] * 0.5 + 0.5) * 255
        if np.abs(pixels - np.round(pixels)).max() > 1e-3:
            raise RuntimeError("the reference no longer rounds after resizing; store its floats instead")
        arrays |= {f"{name}_frames": np.array(frames.shape), f"{name}_grid": out["video_grid_thw"][0]}
        arrays[f"{name}_rows"] = np.round(pixels).astype(np.uint8)
    np.savez_compressed(DATA / "golden_video_patches.npz", **arrays)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.golden.video_patches", description=__doc__)
