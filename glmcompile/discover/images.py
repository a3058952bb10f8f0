"""How a model takes images: its processor, its vision encoder's inputs and features."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import (
    COMPUTED,
    FEATURES,
    PROCESSED,
    Component,
    Port,
    Rule,
    VisionContract,
)
from glmcompile.discover.probe import Trail
from glmcompile.discover.processors import ImageSettings, find_processor
from glmcompile.errors import CheckpointError, GlmcompileError, UnsupportedArchitectureError
from glmcompile.export.attention import Tracing, tracing
from glmcompile.export.components import FeatureForm
from glmcompile.export.replacements import GridRecorder, unique_outputs

# Width and height of the images that the encoder is probed with, and of others, to tell which
# dimensions depend on an image's size.
PROBED, OTHER = (168, 112), (112, 224)


@dataclass(frozen=True)
class Images:
    """What `find_images` finds. fixed: see Structure."""

    contract: VisionContract
    component: Component
    form: FeatureForm
    fixed: Mapping[str, Any]
    trail: Trail
    uniform: bool


def find_images(checkpoint: Checkpoint, model: Any) -> Images:
    """Run the vision encoder on one drawn image, on parameters without storage.

    Raises UnsupportedArchitectureError naming what stands against it.
    """
    token_id = _image_token(checkpoint)
    settings = find_processor(checkpoint)
    inputs, others = (settings.process(drawn(*size)) for size in (PROBED, OTHER))
    taken = inspect.signature(model.get_image_features).parameters
    arrays = {name: value for name, value in inputs.items() if name in taken}
    pixels = {name: value for name, value in arrays.items() if value.dtype == np.float32}
    fixed = {name: torch.from_numpy(v) for name, v in arrays.items() if name not in pixels}
    trail, state, recorder = Trail(), Tracing(), GridRecorder()
    try:
        with (
            torch.no_grad(), tracing(state), trail.watching(model), recorder.watching(),
        ):  # fmt: skip
            tensors = {name: torch.from_numpy(value) for name, value in pixels.items()}
            output = model.get_image_features(**tensors, **fixed, return_dict=True)
    except GlmcompileError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture} cannot be compiled: its vision encoder cannot be run "
            f"without weights ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    form = _form_of(output)
    computed = unique_outputs(recorder.computed)
    values = {
        name: array
        for each in computed
        for name, array in zip(
            each.outputs,
            next(
                v for c, v in zip(recorder.computed, recorder.values, strict=True)
                if c.rule == each.rule
            ),
            strict=True,
        )
    }  # fmt: skip
    patches = len(next(iter(pixels.values())))
    ports = [
        Port(name, PROCESSED, "float32", _dimensions(value, others[name]))
        for name, value in pixels.items()
    ]
    ports += [
        Port(name, COMPUTED, str(value.dtype), (_leading(name, value, patches), *value.shape[1:]))
        for name, value in values.items()
    ]
    features = form.join(output)
    return Images(
        VisionContract(
            token_id,
            _token_text(checkpoint, token_id),
            Rule(settings.rule, asdict(settings.patches)),
            computed,
            tuple(call.shape for call in state.calls),
        ),
        Component(
            tuple(ports),
            (Port("image_features", FEATURES, "float32", ("image_tokens", features.shape[-1])),),
        ),
        form,
        fixed,
        trail,
        trail.is_uniform(model, state.calls),
    )


def drawn(width: int, height: int) -> Image.Image:
    """Noise, coarse enough to survive a resampling."""
    noise = np.random.default_rng(width * height)
    coarse = noise.integers(0, 256, (max(1, height // 14), max(1, width // 14), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _dimensions(one: NDArray[Any], other: NDArray[Any]) -> tuple[int | str, ...]:
    """A processed array's shape; the dimensions that depend on the image's size are named."""
    return tuple("patches" if a != b else a for a, b in zip(one.shape, other.shape, strict=True))


def _leading(name: str, value: NDArray[Any], patches: int) -> int | str:
    if "window_seqlens" in name:
        return "windows_plus_1"
    if "seqlens" in name:
        return "segments_plus_1"
    return "patches" if len(value) == patches else "merged_patches"


def _form_of(output: Any) -> FeatureForm:
    deeper = getattr(output, "deepstack_features", None) or []
    return FeatureForm(
        type(output),
        isinstance(output.pooler_output, list | tuple),
        len(deeper),
        bool(deeper) and isinstance(deeper[0], list | tuple),
    )


def _image_token(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            vocabulary = config.get_text_config().vocab_size
            if not 0 <= token < vocabulary:
                raise CheckpointError(
                    f"{checkpoint.path / 'config.json'}: {name} {token} is not in the "
                    f"vocabulary of {vocabulary} tokens; fetch it again"
                )
            return token
    raise UnsupportedArchitectureError(
        f"{checkpoint.architecture} cannot be compiled: its configuration names no image token"
    )


def _token_text(checkpoint: Checkpoint, token_id: int) -> str:
    """The text of a token, by the tokenizer's own list of them."""
    file = checkpoint.path / "tokenizer.json"
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return next(str(each["content"]) for each in added if each["id"] == token_id)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CheckpointError(
            f"{file} has no special token {token_id}, which config.json names for images; "
            "fetch both again"
        ) from error


__all__ = ["ImageSettings", "Images", "drawn", "find_images"]
