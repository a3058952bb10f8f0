"""The image processor equals transformers' PIL-backend processors byte for byte."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glmcompile.errors import InputError
from glmcompile.runtime.image_processor import ImageProcessor, image_processor
from tests.runtime import reference
from tests.runtime.conftest import TinyModel
from tests.runtime.images import noise

IMAGE_FAMILIES = ("glm4v", "qwen2_vl")
SIZES = [(84, 56), (200, 150), (33, 33), (20, 71), (28, 28), (9, 900), (641, 37), (540, 1200)]

Processors = tuple[ImageProcessor, Any]


@pytest.fixture(params=IMAGE_FAMILIES)
def processors(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]
) -> Processors:
    """Ours and transformers', for one tiny checkpoint."""
    model = tiny_model(request.param)
    ours = image_processor(model.vision, model.directory)
    return ours, reference.image_processor(model.directory, request.param)


def assert_equal(processors: Processors, image: Any, reference_image: Any = None) -> None:
    ours, theirs = processors
    result = ours(image)
    expected = theirs(image if reference_image is None else reference_image)
    grid = np.asarray(expected["image_grid_thw"])
    assert result.grid_thw == tuple(grid[0])
    values = np.ascontiguousarray(expected["pixel_values"])
    assert result.pixel_values.dtype == values.dtype
    assert result.pixel_values.shape == values.shape
    assert result.pixel_values.tobytes() == values.tobytes()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_equal_on_every_size(processors: Processors, width: int, height: int) -> None:
    assert_equal(processors, noise(width, height))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr"])
def test_equal_on_every_mode(processors: Processors, mode: str) -> None:
    assert_equal(processors, noise(90, 70, mode=mode))


def test_equal_on_palettes_and_bitmaps(processors: Processors) -> None:
    palette = noise(90, 70).quantize(16)
    assert_equal(processors, palette)
    palette.info["transparency"] = 3
    assert_equal(processors, palette)
    assert_equal(processors, noise(90, 70).convert("1"))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equal_on_arrays(processors: Processors, channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (61, 95, channels), dtype=np.uint8)
    assert_equal(processors, array)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_files_are_turned_upright_and_lose_alpha(
    processors: Processors, tmp_path: Path, orientation: int, mode: str
) -> None:
    file = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(120, 64, mode=mode).save(file, exif=exif)
    assert_equal(processors, str(file))
    assert_equal(processors, file, str(file))
    assert_equal(processors, file.read_bytes(), str(file))
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    assert_equal(processors, url)
    with Image.open(file) as opened:
        assert_equal(processors, opened)


def test_digest_follows_the_pixels(processors: Processors) -> None:
    process = processors[0]
    image = noise(120, 64)
    changed = image.copy()
    changed.putpixel((60, 30), (1, 2, 3))
    encoded = BytesIO()
    image.save(encoded, "PNG")
    assert process(image).digest == process(encoded.getvalue()).digest
    assert process(image).digest != process(changed).digest
    assert process(image).digest != process(image.transpose(Image.Transpose.ROTATE_90)).digest


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("missing.png", "missing.png: no such image file"),
        ("https://example.com/a.png", "https://example.com/a.png: images are not fetched"),
        (b"not an image", "image of 12 bytes: not a readable image"),
        ("data:image/png,abc", "expected a URL of the form"),
        ("data:image/png;base64,bm90", "not a readable image"),
        ("data:image/png;base64,a", "base64"),
        (np.zeros((4, 4, 3), np.float32), "array float32"),
        (np.zeros((4, 4, 2), np.uint8), "expected uint8"),
        (Image.new("RGB", (3, 3000)), "too narrow"),
        (Image.new("RGB", (0, 5)), "holds nothing"),
        (17, "int object: not an image"),
    ],
)
def test_bad_images_are_named(processors: Processors, bad: Any, named: str) -> None:
    with pytest.raises(InputError, match=named.replace("(", r"\(")):
        processors[0](bad)


def test_a_truncated_file_is_named(processors: Processors, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    noise(200, 200).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.png: not a readable image"):
        processors[0](file)


def test_a_decompression_bomb_is_refused(
    processors: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    encoded = BytesIO()
    noise(40, 40).save(encoded, "PNG")
    with pytest.raises(InputError, match="too many pixels"):
        processors[0](encoded.getvalue())
