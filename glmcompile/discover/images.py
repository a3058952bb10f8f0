"""How a model takes images: its processor, its vision encoder's inputs and features."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import (
    COMPUTED,
    FEATURES,
    PROCESSED,
    Component,
    Port,
    VisionContract,
)
from glmcompile.discover.probe import Trail
from glmcompile.discover.processors import drawn, find_processing
from glmcompile.errors import (
    CheckpointError,
    GlmcompileError,
    UnsupportedArchitectureError,
    brief,
)
from glmcompile.export.attention import Tracing, tracing
from glmcompile.export.components import FeatureForm, features_owner
from glmcompile.export.replacements import GridRecorder, unique_outputs

# Width and height of the image that the encoder is probed with, and of others, to tell which
# dimensions depend on an image's size.
PROBED, OTHERS = (168, 112), ((112, 224), (60, 60))


@dataclass(frozen=True)
class Images:
    """What `find_images` finds. patches: rows of the encoder's layers. Others: see Structure."""

    contract: VisionContract
    component: Component
    form: FeatureForm
    fixed: Mapping[str, Any]
    example: Mapping[str, torch.Tensor]
    kinds: Mapping[str, int]
    patches_per_unit: float
    patches_per_token: float
    trail: Trail
    uniform: bool


def find_images(checkpoint: Checkpoint, model: Any) -> Images:
    """Run the vision encoder on one drawn image, on parameters without storage.

    Raises UnsupportedArchitectureError naming what stands against it.
    """
    token_id = _image_token(checkpoint)
    processing = find_processing(checkpoint, token_id)
    owner = features_owner(model)
    assert owner is not None
    taken = inspect.signature(owner.get_image_features).parameters
    images = [
        {name: value for name, value in processing.arrays(drawn(*size)).items() if name in taken}
        for size in (PROBED, *OTHERS)
    ]
    arrays = images[0]
    whole = [name for name in arrays if _is_whole(name, images)]
    processed = {
        name: value
        for name, value in arrays.items()
        if name not in whole and (value.dtype == np.float32 or "mask" in name)
    }
    fixed = {
        name: torch.from_numpy(value)
        for name, value in arrays.items()
        if name not in processed and name not in whole
    }
    tensors = {name: torch.from_numpy(value) for name, value in processed.items()}
    trail, state, recorder = Trail(), Tracing(), GridRecorder()
    try:
        with (
            torch.no_grad(), tracing(state), trail.watching(model), recorder.watching(),
        ):  # fmt: skip
            output = owner.get_image_features(**tensors, **fixed, return_dict=True)
        form = FeatureForm.of(output)
        features = form.join(output)
    except GlmcompileError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture} cannot be compiled: its vision encoder cannot be run "
            f"without weights ({brief(error)})"
        ) from error
    computed = unique_outputs(recorder.computed)
    values = {
        name: array
        for each in computed
        for name, array in zip(each.outputs, recorder.of(each.rule), strict=True)
    }
    first = next(name for name, value in processed.items() if value.dtype == np.float32)
    processed = {first: processed.pop(first), **processed}
    patches = len(processed[first])
    ports = [
        Port(name, PROCESSED, str(value.dtype), _dimensions(name, [each[name] for each in images]))
        for name, value in processed.items()
    ]
    ports += [
        Port(name, COMPUTED, str(value.dtype), (_leading(name, value, patches), *value.shape[1:]))
        for name, value in values.items()
    ]
    width = int(features.shape[-1])
    rows = max((call.queries for call in state.calls), default=len(features))
    return Images(
        VisionContract(
            token_id,
            processing.placeholder,
            processing.rule,
            computed,
            tuple(call.shape for call in state.calls),
        ),
        Component(
            tuple(ports),
            (Port("image_features", FEATURES, "float32", ("image_tokens", width)),),
        ),
        form,
        fixed,
        tensors | {name: torch.from_numpy(value) for name, value in values.items()},
        processing.kinds,
        rows / dynamic_size(ports[0], processed[ports[0].name]),
        rows / len(features),
        trail,
        trail.is_uniform(model, state.calls),
    )


def dynamic_size(port: Port, value: NDArray[Any]) -> int:
    """The product of an array's dimensions that depend on the image: its patches or tiles."""
    return prod(size for size, own in zip(value.shape, port.shape, strict=True) if type(own) is str)


def _is_whole(name: str, images: Sequence[Mapping[str, NDArray[Any]]]) -> bool:
    """Whether an array is a mask that hides nothing of a single image, and can be left out."""
    return "mask" in name and all(bool(np.all(each[name])) for each in images)


def _dimensions(name: str, arrays: Sequence[NDArray[Any]]) -> tuple[int | str, ...]:
    """A processed array's shape; the dimensions that depend on the image's size are named."""
    return tuple(
        sizes[0] if len(set(sizes)) == 1 else "patches" if axis == 0 else f"{name}_{axis}"
        for axis, sizes in enumerate(zip(*(each.shape for each in arrays), strict=True))
    )


def _leading(name: str, value: NDArray[Any], patches: int) -> int | str:
    if "window_seqlens" in name:
        return "windows_plus_1"
    if "seqlens" in name:
        return "segments_plus_1"
    return "patches" if len(value) == patches else "merged_patches"


def _image_token(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            vocabulary = config.get_text_config().vocab_size
            if not 0 <= token < vocabulary:
                raise CheckpointError(
                    f"{checkpoint.directory / 'config.json'}: {name} {token} is not in the "
                    f"vocabulary of {vocabulary} tokens; fetch it again"
                )
            return token
    raise UnsupportedArchitectureError(
        f"{checkpoint.architecture} cannot be compiled: its configuration names no image token"
    )
