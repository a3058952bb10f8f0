"""The sequences that a compile runs: those compared with torch, and those it calibrates with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from PIL import Image

from glmcompile.calibrate.samples import CalibrationSample
from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import PROCESSED, Contract
from glmcompile.discover.images import dynamic_size
from glmcompile.discover.processors import find_processing
from glmcompile.errors import CalibrationError, InputError
from glmcompile.evaluate.samples import bundled_samples
from glmcompile.rules import position_ids
from glmcompile.runtime.teacher_forcing import AnswerEncoder
from glmcompile.runtime.transformers_processor import grid_of

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


class ImageInputs(Protocol):
    """An image as the vision encoder takes it; ProcessedImage makes its arrays when asked."""

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The image processor's arrays, by the names of the encoder's ports."""
        ...

    @property
    def num_tokens(self) -> int:
        """Image tokens of the prompt."""
        ...

    @property
    def grid_thw(self) -> tuple[int, ...]:
        """Frames, patch rows and patch columns; () where there is no such grid."""
        ...


@dataclass(frozen=True)
class Sample:
    """One sequence: token ids int64 [T], and its images in order."""

    token_ids: NDArray[np.int64]
    images: tuple[ImageInputs, ...] = ()

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        """int64 [images, 3]."""
        grids = [image.grid_thw for image in self.images if image.grid_thw]
        return np.array(grids, np.int64) if grids else np.empty((0, 3), np.int64)


def position_ids_of(checkpoint: Checkpoint, sample: Sample) -> NDArray[np.int64]:
    """Position ids of a sample, int64 [position axes, T]."""
    return position_ids(checkpoint.model, sample.token_ids, sample.grid_thw)[0]


def units_of(checkpoint: Checkpoint, image: ImageInputs) -> int:
    """How many patches or tiles an image has: the encoder's rows are proportional to it."""
    if len(image.grid_thw) == 3:  # whose patches need not be made to be counted
        return prod(image.grid_thw)
    port = checkpoint.model.encoder.having(PROCESSED)[0]
    return dynamic_size(port, image.inputs[port.name])


def patches_of(checkpoint: Checkpoint, image: ImageInputs) -> int:
    """How many rows the encoder's layers have for an image."""
    return round(units_of(checkpoint, image) * checkpoint.structure.patches_per_unit)


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

    def __init__(self, model: Contract, directory: Path) -> None:
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
    processing = find_processing(checkpoint, vision.token_id)
    noise = np.random.default_rng(0)
    samples = []
    for ids, sizes in zip(texts, (DRAWN_IMAGES[:2], DRAWN_IMAGES[2:], ()), strict=True):
        pieces: list[NDArray[np.int64]] = [ids[:1]]
        images: list[_Drawn] = []
        for index, (width, height) in enumerate(sizes, start=1):
            coarse = noise.integers(0, 256, (height // 14, width // 14, 3), np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            arrays, tokens = processing.arrays(image), np.array(processing.tokens(image))
            images.append(_Drawn(arrays, int((tokens == vision.token_id).sum()), grid_of(arrays)))
            pieces += [tokens, ids[index : index + 1]]
        samples.append(Sample(np.concatenate([*pieces, ids[len(sizes) + 1 :]]), tuple(images)))
    return samples


@dataclass(frozen=True)
class _Drawn:
    """An image as transformers' processor gives it."""

    inputs: dict[str, NDArray[Any]]
    num_tokens: int
    grid_thw: tuple[int, ...]
