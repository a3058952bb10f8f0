"""Which image processor an engine uses: its own where it is proved equal to transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import Rule
from glmcompile.errors import (
    ArtifactError,
    CheckpointError,
    InputError,
    UnsupportedArchitectureError,
)
from glmcompile.rules.patches import PatchSettings
from glmcompile.runtime.image_processor import BORROWED, PATCHES, PatchProcessor
from glmcompile.runtime.transformers_processor import (
    GRIDS,
    TOKEN_KINDS,
    image_arrays,
    load_processor,
    processor_name,
)

Arrays = dict[str, NDArray[Any]]

# Width and height of images that lie below, inside and above the bounds that they are proved with.
_SIZES = ((20, 9), (60, 140), (140, 224), (336, 196), (500, 90), (640, 480))
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class Processing:
    """How a checkpoint's images are processed.

    rule: the engine's processor. placeholder: the text of one image in a rendered prompt.
    arrays: what transformers' own processor gives for one image, beside tokens.
    tokens: what stands in the prompt for it. kinds: of the arguments that tell kinds of tokens
    apart, what they are for its image tokens.
    """

    rule: Rule
    placeholder: str
    arrays: Callable[[Image.Image], Arrays]
    tokens: Callable[[Image.Image], list[int]]
    kinds: Mapping[str, int] = field(default_factory=dict)


def drawn(width: int, height: int) -> Image.Image:
    """Noise, coarse enough to survive a resampling."""
    noise = np.random.default_rng(width * height)
    coarse = noise.integers(0, 256, (max(1, height // 14), max(1, width // 14), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def find_processing(checkpoint: Checkpoint, token_id: int) -> Processing:
    """token_id: of the tokens that take image features.

    Raises CheckpointError where the settings are missing or contradict themselves,
    UnsupportedArchitectureError where transformers' own processor cannot be used, either.
    """
    _check_files(checkpoint)
    own = _own_processing(checkpoint, token_id)
    return own if own is not None else _borrowed_processing(checkpoint, token_id)


def _own_processing(checkpoint: Checkpoint, token_id: int) -> Processing | None:
    """By the engine's processor; None where it does not give the same bytes."""
    try:
        processor = AutoImageProcessor.from_pretrained(
            checkpoint.directory, local_files_only=True, backend="pil"
        )
    except Exception as error:  # transformers raises many kinds for a bad field
        raise CheckpointError(
            f"{checkpoint.directory}: transformers cannot read the image processor's settings "
            f"({' '.join(str(error).split())[:300]}); fetch preprocessor_config.json again"
        ) from error
    equal = (each for each in _candidates(checkpoint, processor) if _is_equal(each, processor))
    if (settings := next(equal, None)) is None:
        return None
    own = PatchProcessor(settings, token_id)
    return Processing(
        Rule(PATCHES, asdict(settings)),
        token_text(checkpoint, token_id),
        lambda image: image_arrays(processor([image], return_tensors="np")),
        lambda image: list(own.process(image, "", None).token_ids),
    )


def _borrowed_processing(checkpoint: Checkpoint, token_id: int) -> Processing:
    """By transformers' own processor."""
    name = processor_name(checkpoint.directory, checkpoint.config.model_type)
    if name is None:
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture} cannot be compiled: neither its files nor transformers say "
            "which Processor class it has"
        )
    try:
        processor = load_processor(checkpoint.directory, name)
    except ArtifactError as error:
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture} cannot be compiled: {error}"
        ) from error

    def process(placeholder: str, *images: Image.Image) -> Any:
        return processor(
            text=[" ".join([placeholder] * len(images))],
            images=list(images),
            return_tensors="np",
            add_special_tokens=False,
        )

    failures = []
    for placeholder in _placeholders(checkpoint, processor, token_id):
        try:
            ids = np.asarray(process(placeholder, drawn(*_SIZES[2]))["input_ids"])
        except Exception as error:  # its own kinds
            failures.append(f"{placeholder}: {type(error).__name__} {error}"[:200])
            continue
        if (ids == token_id).any():
            own = partial(process, placeholder)
            return Processing(
                Rule(BORROWED, {"processor": name, "single": not _is_independent(own)}),
                placeholder,
                _then(own, image_arrays),
                _then(own, _ids),
                _kinds(own(drawn(*_SIZES[2])), token_id),
            )
        failures.append(f"{placeholder}: no token {token_id} came of it")
    raise UnsupportedArchitectureError(
        f"{checkpoint.architecture} cannot be compiled: its {name} takes no image at a placeholder "
        f"({'; '.join(failures)})"
    )


def _then(process: Callable[..., Any], use: Callable[[Any], Any]) -> Callable[[Image.Image], Any]:
    return lambda image: use(process(image))


def _ids(made: Any) -> list[int]:
    return [int(id) for id in np.asarray(made["input_ids"]).ravel()]


def _kinds(made: Any, token_id: int) -> dict[str, int]:
    names = [name for name in TOKEN_KINDS if name in made]
    place = _ids(made).index(token_id)
    return {name: int(np.asarray(made[name]).ravel()[place]) for name in names}


def _is_independent(process: Callable[..., Any]) -> bool:
    """Whether two images of a prompt are processed as each would be alone."""
    images = [drawn(*size) for size in (_SIZES[2], _SIZES[3])]
    alone = [process(image) for image in images]
    try:
        both = process(*images)
    except Exception:  # a processor of one image
        return False
    whole, first, second = (_ids(each) for each in (both, *alone))
    if whole[: len(first)] != first or whole[-len(second) :] != second:
        return False
    arrays = [image_arrays(each) for each in (both, *alone)]
    for name, value in arrays[0].items():
        one, other = arrays[1][name], arrays[2][name]
        if one.shape[1:] == other.shape[1:] and not np.array_equal(
            value.reshape(-1, *one.shape[1:]), np.concatenate([one, other])
        ):
            return False
    return True


def _placeholders(checkpoint: Checkpoint, processor: Any, token_id: int) -> list[str]:
    """What a prompt may have in an image's place."""
    named = [
        str(token)
        for owner in (processor, getattr(processor, "tokenizer", None))
        for name in ("image_token", "boi_token")
        if isinstance(token := getattr(owner, name, None), str)
    ]
    return list(dict.fromkeys([*named, token_text(checkpoint, token_id)]))


def token_text(checkpoint: Checkpoint, token_id: int) -> str:
    """The text of a token, by the tokenizer's own list of them."""
    file = checkpoint.directory / "tokenizer.json"
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return next(str(each["content"]) for each in added if each["id"] == token_id)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CheckpointError(
            f"{file} has no special token {token_id}, which config.json names for images; "
            "fetch both again"
        ) from error


def _check_files(checkpoint: Checkpoint) -> None:
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((checkpoint.directory / name).is_file() for name in names):
        raise CheckpointError(
            f"{checkpoint.directory} has no preprocessor_config.json (nor image settings in "
            "processor_config.json); an image model needs it to prepare images"
        )


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
            f"{checkpoint.directory / 'preprocessor_config.json'}: min_pixels {low} is above "
            f"max_pixels {high}"
        )
    if not len(processor.image_mean) == len(processor.image_std) == 3:
        raise CheckpointError(
            f"{checkpoint.directory / 'preprocessor_config.json'}: image_mean and image_std need 3 "
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
    factor = settings.patch_size * settings.merge_size
    low, high = 12 * factor**2, 60 * factor**2
    own = PatchProcessor(replace(settings, min_pixels=low, max_pixels=high), image_token_id=0)
    for size in _SIZES:
        image = drawn(*size)
        try:
            bounds = {"shortest_edge": low, "longest_edge": high}
            expected = dict(processor([image], return_tensors="np", size=bounds))
        except ValueError:
            expected = {}
        try:
            made = own.process(image, "", None)
        except InputError:
            if expected:
                return False
            continue
        grid = next((expected[name] for name in GRIDS if name in expected), None)
        if grid is None or not np.array_equal(grid.ravel(), made.grid_thw):
            return False
        if not np.array_equal(expected["pixel_values"], made.pixel_values):
            return False
    return True
