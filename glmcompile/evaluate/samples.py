"""What engines are evaluated on: the bundled evaluation split, or a user's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glmcompile.calibrate.samples import folder_samples
from glmcompile.errors import InputError
from glmcompile.families import supported
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.input_processor import InputProcessor, Prompt

# Plain text is cut here: attention over more says little about quantization and costs much.
_TEXT_TOKENS = 1024


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


class AnswerEncoder:
    """Samples to tokens through an engine's own prompt and image processing."""

    def __init__(self, engine: Engine) -> None:
        self._inputs = InputProcessor(engine.path, supported()[engine.model.family], engine.model)
        self._limit = engine.model.context_length

    def __call__(self, sample: EvaluationSample) -> tuple[list[int], list[ProcessedImage], int]:
        """Token ids of prompt and answer, the images, and where the predicted tokens begin.

        Of plain text every token but the first is predicted.
        Raises InputError for what the engine would refuse.
        """
        prompts = self._inputs.prompts
        if not sample.prompt and not sample.images:
            ids = prompts.encode(sample.answer, from_template=False)
            if len(ids) < 2:
                raise InputError(f"the text {sample.answer!r} has nothing to predict; leave it out")
            return ids[: min(self._limit, _TEXT_TOKENS)], [], 1
        ready = self._inputs(Prompt(prompt=sample.prompt, images=sample.images))
        answer = prompts.tokenizer.encode(sample.answer, add_special_tokens=False).ids
        ids = (ready.token_ids + answer)[: self._limit]
        return ids, [span.image for span in ready.images], len(ready.token_ids)
