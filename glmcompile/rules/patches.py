"""Images cut into patches of a grid that keeps their aspect ratio: sizes, counts, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmcompile.errors import InputError

MOST_ELONGATED = 200


@dataclass(frozen=True)
class PatchSettings:
    """How an image becomes patches (fields of Hugging Face's `preprocessor_config.json`).

    patch_size: pixels a side. temporal_patch_size: frames of a patch; a still image is repeated.
    merge_size: patches a side that become one image feature.
    min_pixels, max_pixels: bounds on height * width after resizing.
    bounds_count_frames: the bounds are on all frames of a temporal patch together.
    grows_small: sides below a merged patch grow to one first.
    resample: Pillow's filter number (3 is bicubic).
    mean, std: per channel, applied after multiplying the bytes by rescale_factor.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3
    bounds_count_frames: bool = False
    grows_small: bool = False

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> PatchSettings:
        """From what a contract's processor rule says."""
        sequences = {key: tuple(arguments[key]) for key in ("mean", "std")}
        return cls(**dict(arguments, **sequences))

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels, frames, rows and columns."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def image_tokens(self, grid_thw: Sequence[int]) -> int:
        """How many decoder tokens an image of (frames, patch rows, patch columns) takes."""
        frames, rows, columns = (int(side) for side in grid_thw)
        return frames * rows * columns // self.merge_size**2

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """Height and width divisible by a merged patch, their product within the bounds.

        As `smart_resize` of transformers' image processors for such grids.
        Raises InputError for an image whose sides differ by more than a factor of 200.
        """
        factor = self.patch_size * self.merge_size
        frames = self.temporal_patch_size if self.bounds_count_frames else 1
        if self.grows_small and (height < factor or width < factor):
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > MOST_ELONGATED:
            raise InputError(
                f"an image of {width}x{height} pixels is too narrow; "
                f"its sides may differ by at most a factor of {MOST_ELONGATED}"
            )
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if frames * rows * columns > self.max_pixels:
            shrink = math.sqrt((frames * height * width) / self.max_pixels)
            rows = max(factor, math.floor(height / shrink / factor) * factor)
            columns = max(factor, math.floor(width / shrink / factor) * factor)
        elif frames * rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (frames * height * width))
            rows = math.ceil(height * grow / factor) * factor
            columns = math.ceil(width * grow / factor) * factor
        return rows, columns
