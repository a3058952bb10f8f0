"""Which image processor an engine uses: its own where it is proved equal to transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from glmcompile.checkpoint import Checkpoint
from glmcompile.errors import CheckpointError, InputError, UnsupportedArchitectureError
from glmcompile.rules.patches import PatchSettings

# Width and height of images that lie below, inside and above the bounds that they are proved with.
_SIZES = ((20, 9), (60, 140), (140, 224), (336, 196), (500, 90), (640, 480))
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class ImageSettings:
    """How a checkpoint's images are processed. rule: name of the engine's own processor."""

    rule: str
    patches: PatchSettings
    processor: Any

    def process(self, image: Image.Image) -> dict[str, NDArray[Any]]:
        """What transformers' own processor gives for one image."""
        return process(self.processor, image)


def process(processor: Any, image: Image.Image, **options: Any) -> dict[str, NDArray[Any]]:
    return dict(processor([image], return_tensors="np", **options))


def find_processor(checkpoint: Checkpoint) -> ImageSettings:
    """Raises CheckpointError where the settings are missing or contradict themselves,
    UnsupportedArchitectureError for a processor that the engine has no equal of."""
    processor = load_processor(checkpoint)
    for settings in _candidates(checkpoint, processor):
        if _is_equal(settings, processor):
            return ImageSettings("patches", settings, processor)
    raise UnsupportedArchitectureError(
        f"{checkpoint.architecture} cannot be compiled: the engine has no image processor equal to "
        f"{type(processor).__name__}"
    )


def load_processor(checkpoint: Checkpoint) -> Any:
    """transformers' image processor of a checkpoint, on Pillow and NumPy."""
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((checkpoint.path / name).is_file() for name in names):
        raise CheckpointError(
            f"{checkpoint.path} has no preprocessor_config.json (nor image settings in "
            "processor_config.json); an image model needs it to prepare images"
        )
    try:
        return AutoImageProcessor.from_pretrained(
            checkpoint.path, local_files_only=True, backend="pil"
        )
    except Exception as error:  # transformers raises many kinds for a bad field
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot read the image processor's settings "
            f"({' '.join(str(error).split())[:300]}); fetch preprocessor_config.json again"
        ) from error


def _candidates(checkpoint: Checkpoint, processor: Any) -> Iterator[PatchSettings]:
    """Settings of processors for a grid of patches, if this may be one."""
    needed = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size")
    if any(getattr(processor, name, None) is None for name in needed):
        return
    if not all(getattr(processor, step, True) for step in _STEPS):
        return
    low, high = processor.size.get("shortest_edge"), processor.size.get("longest_edge")
    if low is None or high is None:
        return
    if low > high:
        raise CheckpointError(
            f"{checkpoint.path / 'preprocessor_config.json'}: min_pixels {low} is above "
            f"max_pixels {high}"
        )
    if not len(processor.image_mean) == len(processor.image_std) == 3:
        raise CheckpointError(
            f"{checkpoint.path / 'preprocessor_config.json'}: image_mean and image_std need 3 "
            "values, one a channel"
        )
    for counts, grows in ((False, False), (True, True), (True, False), (False, True)):
        yield PatchSettings(
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
            min_pixels=int(low),
            max_pixels=int(high),
            mean=tuple(float(value) for value in processor.image_mean),
            std=tuple(float(value) for value in processor.image_std),
            rescale_factor=float(processor.rescale_factor),
            resample=int(processor.resample),
            bounds_count_frames=counts,
            grows_small=grows,
        )


def _is_equal(settings: PatchSettings, processor: Any) -> bool:
    """Whether the engine's processor gives the same bytes, under bounds that small images reach."""
    from dataclasses import replace

    from glmcompile.discover.images import drawn
    from glmcompile.runtime.image_processor import ImageProcessor

    factor = settings.patch_size * settings.merge_size
    bounds = {"shortest_edge": 12 * factor**2, "longest_edge": 60 * factor**2}
    bounded = replace(
        settings, min_pixels=bounds["shortest_edge"], max_pixels=bounds["longest_edge"]
    )
    own = ImageProcessor(bounded)
    for size in _SIZES:
        image = drawn(*size)
        try:
            expected = process(processor, image, size=bounds)
        except ValueError:
            expected = {}
        try:
            made = own(image)
        except InputError:
            if expected:
                return False
            continue
        if not expected or not np.array_equal(expected["image_grid_thw"][0], made.grid_thw):
            return False
        if not np.array_equal(expected["pixel_values"], made.pixel_values):
            return False
    return True
