"""Where calibration samples come from: the bundled generator and texts, or a user's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from glmcompile.contract import Contract
from glmcompile.errors import CalibrationError
from glmcompile.quantize.schemes import Recipe

INDEX = "samples.jsonl"


@dataclass(frozen=True)
class CalibrationSample:
    """A prompt with its images and, where it is known, the answer; an empty prompt is plain text.

    The answer is fed to the model after the prompt, so that generated tokens are calibrated, too.
    """

    prompt: str
    answer: str = ""
    images: tuple[Image.Image | Path, ...] = ()


def bundled_samples(with_images: bool, count: int) -> Iterator[CalibrationSample]:
    """Phone screens with questions for image models, passages of text for others."""
    import calibration
    from calibration.texts import texts

    if with_images:
        for sample in calibration.samples("calibration", count):
            yield CalibrationSample(sample.prompt, sample.answer, (sample.image,))
        return
    for index, text in enumerate(texts("calibration", count)):
        # Every other passage answers a chat turn: chat tokens have ranges of their own.
        yield CalibrationSample("Explain this part of the language." if index % 2 else "", text)


def recipe_samples(
    model: Contract, recipe: Recipe, folder: str | Path | None
) -> list[CalibrationSample]:
    """As many samples as a recipe asks for. folder: a user's; None takes the bundled ones.

    Raises CalibrationError as folder_samples does.
    """
    if folder is not None:
        return list(folder_samples(folder, recipe.samples))
    return list(bundled_samples(model.vision is not None, recipe.samples))


def folder_samples(folder: str | Path, count: int) -> Iterator[CalibrationSample]:
    """Read up to `count` samples of a folder with a `samples.jsonl`.

    Each line: {"prompt": "...", "answer": "..." (optional), "image": "file.png" or "images": [...]
    (optional)}, files relative to the folder.
    Raises CalibrationError naming the file and line.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        raise CalibrationError(
            f"{folder}: expected a folder with a {INDEX}, one object with prompt, answer and "
            "image(s) a line."
        )
    found = 0
    # Bytes, so that a line that is no text is refused with its number, as one that is no JSON.
    with open(index, "rb") as lines:
        for number, line in islice(enumerate(lines, 1), count):
            yield _parse(folder, f"{index}:{number}", line)
            found += 1
    if not found:
        raise CalibrationError(f"{index}: holds no sample.")


def _parse(folder: Path, where: str, line: bytes) -> CalibrationSample:
    try:
        fields = json.loads(line)
        prompt, answer = fields["prompt"], fields.get("answer", "")
        names = fields.get("images", [fields["image"]] if "image" in fields else [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f'{where}: expected {{"prompt": ..., "answer": ..., "image": ...}} ({error!r}).'
        ) from error
    if not isinstance(prompt, str) or not isinstance(answer, str) or not isinstance(names, list):
        raise CalibrationError(f"{where}: prompt and answer are to be strings, images a list.")
    images = tuple(folder / str(name) for name in names)
    for image in images:
        if not image.is_file():
            raise CalibrationError(f"{where}: {image} does not exist.")
    return CalibrationSample(prompt, answer, images)


def digest(samples: Iterable[CalibrationSample]) -> str:
    """SHA-256 over prompts, answers and pixels, for the manifest."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(json.dumps([sample.prompt, sample.answer]).encode())
        for image in sample.images:
            if isinstance(image, Path):
                state.update(image.read_bytes())
            else:
                state.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return state.hexdigest()
