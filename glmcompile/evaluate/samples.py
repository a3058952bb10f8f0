"""What engines are evaluated on: the bundled evaluation split, or a user's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glmcompile.calibrate.samples import folder_samples
from glmcompile.contract import Contract
from glmcompile.errors import InputError


@dataclass(frozen=True)
class EvaluationSample:
    """A prompt with images and the answer expected; an empty prompt makes the answer plain text.

    correct: judges an answer; None where nothing is to be generated, for plain text.
    """

    prompt: str
    answer: str
    images: tuple[Any, ...] = ()
    kind: str = "all"
    correct: Callable[[str], bool] | None = None


def bundled_samples(with_images: bool, count: int) -> Iterator[EvaluationSample]:
    """Phone screens with questions for image models, passages of text for others.

    Both are disjoint from what calibrates and trains.
    """
    import calibration
    from calibration.texts import texts

    if not with_images:
        yield from (EvaluationSample("", text) for text in texts("evaluation", count))
        return
    for sample in calibration.samples("evaluation", count):
        yield EvaluationSample(
            sample.prompt,
            sample.answer,
            (sample.image,),
            sample.kind,
            partial(calibration.is_correct, sample),
        )


def evaluation_samples(
    model: Contract, folder: str | Path | None, count: int
) -> list[EvaluationSample]:
    """At most `count` samples for a model. folder: a user's; None takes the bundled split.

    Raises CalibrationError and InputError as user_samples does.
    """
    if folder is not None:
        return list(user_samples(folder, count))
    return list(bundled_samples(model.vision is not None, count))


def user_samples(folder: str | Path, count: int) -> Iterator[EvaluationSample]:
    """Samples of a folder in calibration's format (calibrate.samples), where each has an answer.

    An answer is correct when it equals the expected one but for white space at its ends.
    Raises CalibrationError for a malformed folder, InputError for a sample without an answer.
    """
    for number, sample in enumerate(folder_samples(folder, count), 1):
        if not sample.answer:
            raise InputError(f"{folder}: sample {number} has no answer to evaluate against.")
        judge = partial(_equal, sample.answer) if sample.prompt else None
        yield EvaluationSample(sample.prompt, sample.answer, sample.images, correct=judge)


def _equal(expected: str, answer: str) -> bool:
    return answer.strip() == expected.strip()
