"""The size an image is resized to: a grid of merged patches within the processor's pixel bounds."""

from __future__ import annotations

import math

from glmcompile.config import VisionConfig
from glmcompile.errors import InputError

MOST_ELONGATED = 200


def fit_pixels(height: int, width: int, vision: VisionConfig, frames: int = 1) -> tuple[int, int]:
    """Height and width divisible by a merged patch, `frames` times their product within bounds.

    As `smart_resize` of transformers' Qwen2-VL image processor.
    Raises InputError for an image whose sides differ by more than a factor of 200.
    """
    factor = vision.patch_size * vision.merge_size
    low, high = vision.processor.min_pixels, vision.processor.max_pixels
    if max(height, width) / min(height, width) > MOST_ELONGATED:
        raise InputError(
            f"an image of {width}x{height} pixels is too narrow; "
            f"its sides may differ by at most a factor of {MOST_ELONGATED}"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if frames * rows * columns > high:
        shrink = math.sqrt((frames * height * width) / high)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * rows * columns < low:
        grow = math.sqrt(low / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns
