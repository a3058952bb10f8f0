"""Deterministic test images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth coloured noise, so that resampling has something to interpolate."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 5, bands), dtype=np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode if bands > 1 else "L")
    return image.resize((width, height), Image.Resampling.BICUBIC)
