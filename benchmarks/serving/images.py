"""Pictures for requests: phone screens and noise, as PNG files in data URLs."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def part(encoded: bytes) -> dict[str, Any]:
    """An image part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(encoded)}}


def screenshot(seed: int, width: int = 1080, height: int = 2400) -> bytes:
    """Blocks of colour with some noise: a file of a screenshot's size, never the same twice."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 60 + 1, width // 60 + 1, 3), np.uint8)
    pixels = blocks.repeat(60, 0).repeat(60, 1)[:height, :width].copy()
    for _ in range(40):
        y, x = rng.integers(0, height - 40), rng.integers(0, width - 200)
        pixels[y : y + 40, x : x + 200] = rng.integers(0, 256, (40, 200, 3), np.uint8)
    return png(Image.fromarray(pixels))


def questions(count: int, seed: int) -> list[tuple[bytes, str]]:
    """Phone screens of the evaluation split, all distinct, each with a question about it."""
    import calibration

    return [
        (png(sample.image), sample.prompt)
        for sample in calibration.samples("evaluation", count, seed=seed)
    ]
