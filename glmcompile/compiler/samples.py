"""The sequences that a compile runs: those compared with torch, and those it calibrates with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from glmcompile.calibrate.samples import CalibrationSample
from glmcompile.checkpoint import Checkpoint
from glmcompile.config import ModelConfig
from glmcompile.errors import CalibrationError, InputError
from glmcompile.evaluate.samples import bundled_samples
from glmcompile.runtime.teacher_forcing import AnswerEncoder

# Width and height of the images of the drawn samples; two of them share a prompt.
DRAWN_IMAGES = ((140, 224), (336, 196), (84, 84))
DRAWN_PROMPTS = (
    "The settings screen lists the networks nearby.",
    "What is shown here, and where would you tap to open it?",
    "Yes.",
)
# Real screens or texts beside them, held out from calibration, and where each is cut.
HELD_OUT = 2
HELD_OUT_TOKENS = 192


class ImagePatches(Protocol):
    """An image as the vision encoder takes it; ProcessedImage makes its patches when asked."""

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """float32 [patches, patch values]."""
        ...

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Frames, patch rows and patch columns."""
        ...


@dataclass(frozen=True)
class Sample:
    """One sequence: token ids int64 [T], and its images in order."""

    token_ids: NDArray[np.int64]
    images: tuple[ImagePatches, ...] = ()

    def pixel_values(self) -> NDArray[np.float32]:
        """Patches of all images, float32 [patches, patch values]; made at every call."""
        return np.concatenate([image.pixel_values for image in self.images])

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        """int64 [images, 3]."""
        return np.array([image.grid_thw for image in self.images], np.int64).reshape(-1, 3)


def packed_images(samples: Sequence[Sample]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Patches float32 [patches, patch values] and grids int64 [images, 3] of all samples."""
    pixels = [sample.pixel_values() for sample in samples if sample.images]
    return np.concatenate(pixels), np.concatenate([sample.grid_thw for sample in samples])


def position_ids_of(checkpoint: Checkpoint, sample: Sample) -> NDArray[np.int64]:
    """Position ids of a sample, int64 [position axes, T]."""
    family, model = checkpoint.family, checkpoint.model
    return family.position_ids(sample.token_ids, sample.grid_thw, model)[0]


def compared_samples(checkpoint: Checkpoint, directory: Path) -> list[Sample]:
    """What every component is compared on: drawn images and short prompts, and held-out samples.

    directory: holds the tokenizer and chat template. An image model gets one sample with two
    images of different sizes, one with one, one with none, and real screens.
    """
    encode = _Encoder(checkpoint.model, directory)
    with_images = checkpoint.model.vision is not None
    held_out = [
        encode(CalibrationSample(each.prompt, each.answer, each.images), HELD_OUT_TOKENS)
        for each in bundled_samples(with_images, HELD_OUT)
    ]
    return [*drawn_samples(checkpoint), *held_out]


def calibration_samples(
    checkpoint: Checkpoint,
    directory: Path,
    samples: Sequence[CalibrationSample],
    max_tokens: int,
) -> list[Sample]:
    """Samples as the model sees them, cut at `max_tokens` but never inside their images.

    Raises CalibrationError for a sample that the model's processor refuses.
    """
    encode = _Encoder(checkpoint.model, directory)
    encoded = []
    for number, sample in enumerate(samples, 1):
        try:
            encoded.append(encode(sample, max_tokens))
        except InputError as error:
            raise CalibrationError(f"calibration sample {number}: {error}") from error
    return encoded


class _Encoder:
    """Prompts, answers and images to samples, as an engine prepares them."""

    def __init__(self, model: ModelConfig, directory: Path) -> None:
        self._model = model
        self._encode = AnswerEncoder(directory, model)

    def __call__(self, sample: CalibrationSample, max_tokens: int) -> Sample:
        ids, images, _ = self._encode(sample.prompt, sample.answer, sample.images)
        places = np.flatnonzero(np.asarray(ids) == self._model.image_token_id)
        keep = max(max_tokens, int(places[-1]) + 1 if len(places) else 0)
        return Sample(np.asarray(ids[:keep], np.int64), tuple(images))


def drawn_samples(checkpoint: Checkpoint) -> list[Sample]:
    """Prompts of several lengths; for an image model one holds two images and one holds one."""
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json"))
    texts = [np.array(tokenizer.encode(text).ids, np.int64) for text in DRAWN_PROMPTS]
    vision = checkpoint.model.vision
    if vision is None:
        return [Sample(ids) for ids in texts]
    # transformers' own processor, so that the engine's is not compared with itself.
    processor = AutoImageProcessor.from_pretrained(
        checkpoint.directory, local_files_only=True, backend="pil"
    )
    noise = np.random.default_rng(0)
    samples = []
    for ids, sizes in zip(texts, (DRAWN_IMAGES[:2], DRAWN_IMAGES[2:], ()), strict=True):
        pieces: list[NDArray[np.int64]] = [ids[:1]]
        images: list[_Drawn] = []
        for index, (width, height) in enumerate(sizes, start=1):
            coarse = noise.integers(0, 256, (height // 14, width // 14, 3), np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            processed = processor([image], return_tensors="np")
            frames, rows, columns = (int(side) for side in processed["image_grid_thw"][0])
            images.append(_Drawn(processed["pixel_values"], (frames, rows, columns)))
            count = checkpoint.family.image_tokens(images[-1].grid_thw, vision)
            image_tokens = np.full(count, checkpoint.model.image_token_id, np.int64)
            pieces += [image_tokens, ids[index : index + 1]]
        samples.append(Sample(np.concatenate([*pieces, ids[len(sizes) + 1 :]]), tuple(images)))
    return samples


@dataclass(frozen=True)
class _Drawn:
    pixel_values: NDArray[np.float32]
    grid_thw: tuple[int, int, int]
