"""Images to patches: NumPy and Pillow, equal to the Hugging Face processors byte for byte."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from glmcompile.config import VisionConfig
from glmcompile.errors import InputError
from glmcompile.families import Family

ImageInput = str | Path | bytes | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class ProcessedImage:
    """One image, resized; its patches are made when the vision encoder wants them.

    pixels: uint8 [height, width, channels], a tenth of pixel_values' size; a waiting request keeps
        these alone.
    grid_thw: frames, patch rows and patch columns; their product is the number of patches.
    digest: SHA-256 of the pixels and their size; equal digests mean equal pixel_values.
    """

    pixels: NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    digest: bytes
    processor: ImageProcessor

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """float32 [patches, channels * temporal_patch_size * patch_size^2], new at every call."""
        return self.processor.patches(self.pixels)


class ImageProcessor:
    """Resize, rescale, normalise and cut images as one model's Hugging Face processor does."""

    def __init__(self, family: Family, vision: VisionConfig) -> None:
        self._family = family
        self._vision = vision
        config = vision.processor
        # The whole of rescaling and normalising depends on a byte and its channel alone. The types
        # follow transformers' `rescale` (float64, rounded to float32) and `normalize` (float32).
        levels = (np.arange(256).astype(np.float64) * config.rescale_factor).astype(np.float32)
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        self._levels: NDArray[np.float32] = (levels - mean[:, None]) / std[:, None]

    def __call__(self, image: ImageInput) -> ProcessedImage:
        """Process one image: a path, a `data:` URL, an encoded file's bytes, a Pillow image or an
        array uint8 [height, width] or [height, width, 1, 3 or 4].

        As in transformers, files and URLs are turned upright by their EXIF orientation and lose
        their alpha channel, while Pillow images and arrays are taken as they stand and their
        transparency is laid over white.
        Raises InputError naming the image when it is missing, damaged or of an unusable shape.
        """
        name = describe(image)
        rgb = _load_rgb(image, name)
        height, width = rgb.shape[:2]
        if not height or not width:
            raise InputError(f"{name}: an image of {width}x{height} pixels holds nothing")
        assert self._family.resize is not None
        try:
            new_height, new_width = self._family.resize(height, width, self._vision)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        resized = np.asarray(
            Image.fromarray(rgb).resize(
                (new_width, new_height), Image.Resampling(self._vision.processor.resample)
            )
        )
        digest = hashlib.sha256(f"{new_height}x{new_width}:".encode())
        digest.update(resized.tobytes())
        side = self._vision.patch_size
        grid_thw = (1, new_height // side, new_width // side)
        return ProcessedImage(resized, grid_thw, digest.digest(), self)

    def patches(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise uint8 [height, width, channels], cut it into patches, merge window by window.

        A still image fills a temporal patch by being repeated.
        """
        side, merge = self._vision.patch_size, self._vision.merge_size
        frames, channels = self._vision.temporal_patch_size, pixels.shape[2]
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        windows = pixels.reshape(
            rows // merge, merge, side, columns // merge, merge, side, channels
        ).transpose(0, 3, 1, 4, 6, 2, 5)
        patches = np.empty((rows // merge, merge * columns, channels, frames, side**2), np.float32)
        for window_row, made in zip(windows, patches, strict=True):  # each fits into the caches
            flat = np.ascontiguousarray(window_row).reshape(-1, channels, side**2)
            for channel in range(channels):
                made[:, channel] = self._levels[channel].take(flat[:, channel])[:, None]
        return patches.reshape(rows * columns, -1)


def describe(image: Any) -> str:
    """How error messages name an image."""
    if isinstance(image, str | Path):
        text = str(image)
        return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
    if isinstance(image, bytes | bytearray | memoryview):
        return f"image of {len(image)} bytes"
    if isinstance(image, Image.Image):
        return getattr(image, "filename", "") or f"image of {image.width}x{image.height} pixels"
    if isinstance(image, np.ndarray):
        return f"array {image.dtype}{list(image.shape)}"
    return f"{type(image).__name__} object"


def _load_rgb(image: Any, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of any accepted input."""
    try:
        if isinstance(image, Image.Image):
            return np.asarray(_over_white(image))
        if isinstance(image, np.ndarray):
            return _array_rgb(image, name)
        with Image.open(_source(image, name)) as opened:
            # Loads the pixels, too: a truncated file is found here.
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except InputError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(
            f"{name}: not a readable image ({reason}); give a PNG, JPEG, WebP or another file "
            "that Pillow reads"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: too many pixels ({error}); scale the image down first"
        ) from error


def _source(image: Any, name: str) -> Path | BytesIO:
    """What Pillow is to open."""
    if isinstance(image, bytes | bytearray | memoryview):
        return BytesIO(image)
    if isinstance(image, str) and image.startswith("data:"):
        header, comma, payload = image.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InputError(f"{name}: expected a URL of the form data:image/png;base64,...")
        try:
            return BytesIO(base64.b64decode(payload.encode(), validate=False))
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name}: the data URL holds no valid base64 ({error})") from error
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise InputError(f"{name}: images are not fetched; give a file or a data: URL instead")
    if isinstance(image, str | Path):
        path = Path(image)
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name the file system cannot hold
            pass
        raise InputError(f"{name}: no such image file")
    raise InputError(
        f"{name}: not an image; give a path, a data: URL, bytes, a Pillow image or an array"
    )


def _over_white(image: Image.Image) -> Image.Image:
    """RGB, as transformers' `convert_to_rgb` for Pillow images."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _array_rgb(image: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """RGB, as transformers' `convert_to_rgb` for arrays with channels last."""
    pixels = image[:, :, None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"{name}: expected uint8 [height, width] or [height, width, 1, 3 or 4]")
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    elif pixels.shape[2] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)
