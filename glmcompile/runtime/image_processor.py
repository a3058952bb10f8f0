"""Images to what the vision encoder takes: by the engine's own processor or transformers'."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glmcompile.contract import VisionContract
from glmcompile.errors import InputError
from glmcompile.rules.patches import PatchSettings
from glmcompile.runtime.image_decoder import array_rgb, decode_rgb, pillow_rgb
from glmcompile.runtime.media import OWN, ImageSource, InputPolicy, read_image
from glmcompile.runtime.transformers_processor import TransformersProcessor

PATCHES, BORROWED = "patches", "transformers"  # names of a contract's processor
ImageInput = str | Path | bytes | Image.Image | NDArray[np.uint8]


class ProcessedImage(Protocol):
    """One image, ready for the prompt and the vision encoder.

    grid_thw: frames, patch rows and patch columns; () where it is cut into no such grid.
    digest: SHA-256; equal digests mean equal inputs.
    """

    @property
    def digest(self) -> bytes: ...

    @property
    def grid_thw(self) -> tuple[int, ...]: ...

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """What the vision encoder takes of it, by the names of its ports."""

    @property
    def num_tokens(self) -> int:
        """How many tokens of the prompt take its features."""

    @property
    def token_ids(self) -> Sequence[int]:
        """What stands in the prompt for it."""


@dataclass(frozen=True)
class PatchImage:
    """One image, resized; its patches are made when the vision encoder wants them.

    pixels: uint8 [height, width, channels], a tenth of pixel_values' size; a waiting request keeps
        these alone.
    grid_thw: frames, patch rows and patch columns; their product is the number of patches.
    digest: SHA-256 of the pixels and their size.
    """

    pixels: NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    digest: bytes
    processor: PatchProcessor

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """float32 [patches, channels * temporal_patch_size * patch_size^2], new at every call."""
        return self.processor.patches(self.pixels)

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """New at every call."""
        return {"pixel_values": self.pixel_values}

    @property
    def num_tokens(self) -> int:
        return self.processor.settings.image_tokens(self.grid_thw)

    @property
    def token_ids(self) -> Sequence[int]:
        return [self.processor.image_token_id] * self.num_tokens


class ImageProcessor(abc.ABC):
    """Any image a caller may give to what the model takes."""

    def __call__(
        self, image: ImageInput | ImageSource, policy: InputPolicy = OWN
    ) -> ProcessedImage:
        """Process one image: a path, a URL, an encoded file's bytes, a Pillow image or an array
        uint8 [height, width] or [height, width, 1, 3 or 4].

        As in transformers, files are turned upright by their EXIF orientation and lose their alpha
        channel, while Pillow images and arrays are taken as they stand and their transparency is
        laid over white. Of an animation the first frame is taken.
        Raises InputError naming the image when it is missing, damaged, of an unusable shape or
        against the policy.
        """
        if not isinstance(image, ImageSource):
            image = ImageSource(image, describe(image))
        rgb = _rgb(image, policy)
        if not rgb.height or not rgb.width:
            raise InputError(
                f"{image.where}: an image of {rgb.width}x{rgb.height} pixels holds nothing"
            )
        return self.process(rgb, image.where, policy.max_pixels)

    @abc.abstractmethod
    def process(self, rgb: Image.Image, where: str, max_pixels: int | None) -> ProcessedImage:
        """Process an RGB image. where: how errors name it. max_pixels: a bound of the caller's."""


class BorrowedProcessor(ImageProcessor):
    """transformers' own processor."""

    def __init__(self, processor: TransformersProcessor) -> None:
        self._processor = processor

    def process(self, rgb: Image.Image, where: str, max_pixels: int | None) -> ProcessedImage:
        """See ImageProcessor. Raises InputError for a bound on pixels, which it does not know."""
        if max_pixels is not None:
            raise InputError(
                f"max_pixels is {max_pixels}; this model's image processor takes no such bound"
            )
        return self._processor(rgb, where)


class PatchProcessor(ImageProcessor):
    """Resize, rescale, normalise and cut images as one model's Hugging Face processor does."""

    def __init__(self, settings: PatchSettings, image_token_id: int) -> None:
        self.settings = settings
        self.image_token_id = image_token_id
        # The whole of rescaling and normalising depends on a byte and its channel alone. The types
        # follow transformers' `rescale` (float64, rounded to float32) and `normalize` (float32).
        levels = (np.arange(256).astype(np.float64) * settings.rescale_factor).astype(np.float32)
        mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
        self._levels: NDArray[np.float32] = (levels - mean[:, None]) / std[:, None]

    def process(self, rgb: Image.Image, where: str, max_pixels: int | None) -> PatchImage:
        """See ImageProcessor."""
        try:
            height, width = self._bounded(max_pixels).resize(rgb.height, rgb.width)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        filter = Image.Resampling(self.settings.resample)
        resized = np.asarray(rgb.resize((width, height), filter))
        digest = hashlib.sha256(f"{height}x{width}:".encode())
        digest.update(resized.data)
        side = self.settings.patch_size
        return PatchImage(resized, (1, height // side, width // side), digest.digest(), self)

    def patches(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise uint8 [height, width, channels], cut it into patches, merge window by window.

        A still image fills a temporal patch by being repeated.
        """
        side, merge = self.settings.patch_size, self.settings.merge_size
        frames, channels = self.settings.temporal_patch_size, pixels.shape[2]
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

    def _bounded(self, max_pixels: int | None) -> PatchSettings:
        """The encoder's description with a lower bound on pixels. Raises InputError for one that
        not even the smallest image keeps."""
        own = self.settings
        if max_pixels is None or max_pixels >= own.max_pixels:
            return own
        if max_pixels < own.min_pixels:
            raise InputError(
                f"max_pixels is {max_pixels}; this model's images have at least {own.min_pixels}"
            )
        return replace(own, max_pixels=max_pixels)


def image_processor(vision: VisionContract, directory: Path) -> ImageProcessor:
    """The processor that a contract names. directory: of the engine, which holds its files.

    Raises ArtifactError where it needs a package that is not installed.
    """
    arguments = vision.processor.arguments
    if vision.processor.name == PATCHES:
        return PatchProcessor(PatchSettings.read(arguments), vision.token_id)
    name, placeholder = arguments["processor"], vision.placeholder
    return BorrowedProcessor(TransformersProcessor(directory, name, placeholder, vision.token_id))


def describe(image: Any) -> str:
    """How errors name an image that has no other name."""
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


def _rgb(image: ImageSource, policy: InputPolicy) -> Image.Image:
    """Any accepted input in RGB."""
    source = read_image(image, policy)
    if isinstance(source, Image.Image):
        return pillow_rgb(source, image.where)
    if isinstance(source, np.ndarray):
        return array_rgb(source, image.where)
    return decode_rgb(source, image.where, policy.max_source_pixels)
