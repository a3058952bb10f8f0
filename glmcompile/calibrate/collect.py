"""Runs calibration samples through observed graphs and keeps the largest magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmcompile.calibrate.observe import PREFIX
from glmcompile.calibrate.samples import CalibrationSample
from glmcompile.config import ModelConfig
from glmcompile.errors import CalibrationError, InputError
from glmcompile.families import supported
from glmcompile.runtime.image_processor import ImageProcessor, ProcessedImage
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.runtime.teacher_forcing import TeacherForcing

Statistics = dict[str, NDArray[np.float32]]


def collect(
    directory: Path,
    model: ModelConfig,
    samples: Sequence[CalibrationSample],
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Largest magnitude per channel, float32 `[channels]`, by observation name.

    directory: observed graphs beside the tokenizer and chat template. max_tokens: samples that are
    longer are cut there, but never inside their images.
    Raises CalibrationError for a sample that the model's processor refuses.
    """
    encoder = SampleEncoder(directory, model)
    forward = TeacherForcing(directory, model)
    statistics: Statistics = {}
    for done, sample in enumerate(samples, 1):
        try:
            token_ids, images = encoder(sample)
        except InputError as error:
            raise CalibrationError(f"calibration sample {done}: {error}") from error
        keep = max(max_tokens, _end_of_images(token_ids, model))
        outputs = forward(token_ids[:keep], images, rows=range(len(token_ids[:keep]))[-16:])
        for name, value in outputs.items():
            if name.startswith(PREFIX):
                label = name.removeprefix(PREFIX)
                known = statistics.get(label)
                statistics[label] = value if known is None else np.maximum(known, value)
        progress(done)
    return statistics


class SampleEncoder:
    """Samples to token ids and processed images, through the engine's own prompt and processor."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        family = supported()[model.family]
        self._family, self._model = family, model
        self._prompts = PromptBuilder(directory, family)
        self._images = ImageProcessor(family, model.vision) if model.vision else None

    def __call__(self, sample: CalibrationSample) -> tuple[list[int], list[ProcessedImage]]:
        """Token ids of prompt and answer, image placeholders expanded, and the images in order.

        Raises InputError for images that are unreadable or given to a text model.
        """
        if sample.images and self._images is None:
            raise InputError(f"it has images, but a {self._family.name} model takes text only")
        images = [self._images(image) for image in sample.images] if self._images else []
        if not sample.prompt and not images:
            return self._prompts.encode(sample.answer, from_template=False), []
        message = self._prompts.user_message(sample.prompt, sample.images)
        if self._prompts.has_chat_template:
            messages, _ = self._prompts.split_images([message])
            text = self._prompts.render(messages)
        else:
            text = (self._family.image_placeholder or "") * len(images) + sample.prompt
        vision = self._model.vision
        counts = [self._family.image_tokens(i.grid_thw, vision) for i in images] if vision else []
        text = self._prompts.expand(text, counts) + sample.answer
        return self._prompts.encode(text, from_template=self._prompts.has_chat_template), images


def _end_of_images(token_ids: Sequence[int], model: ModelConfig) -> int:
    places = np.flatnonzero(np.asarray(token_ids) == model.image_token_id)
    return int(places[-1]) + 1 if len(places) else 0
