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
from glmcompile.runtime.teacher_forcing import AnswerEncoder, TeacherForcing

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
    encode = AnswerEncoder(directory, model)
    forward = TeacherForcing(directory, model)
    statistics: Statistics = {}
    for done, sample in enumerate(samples, 1):
        try:
            token_ids, images, _ = encode(sample.prompt, sample.answer, sample.images)
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


def _end_of_images(token_ids: Sequence[int], model: ModelConfig) -> int:
    places = np.flatnonzero(np.asarray(token_ids) == model.image_token_id)
    return int(places[-1]) + 1 if len(places) else 0
