"""Stored tensors as a module's parameters: transformers' own renamings and conversions.

Rules: `convert_and_load_state_dict_in_model` of transformers' core_model_loading.py. What it does
for a whole model at once is done here for one parameter, when that parameter is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from glmcompile.checkpoint.sources import PLAIN_DTYPES, Source, WeightFiles, checked
from glmcompile.errors import CheckpointError


class Conversion:
    """transformers' rules for one module: the stored name to the parameter's name.

    transforms: the rules; None takes those that transformers has for the module.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, transforms: Sequence[Any] | None = None
    ) -> None:
        self.model = model
        self.state = model.state_dict()
        if transforms is None:
            transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def rename(self, key: str) -> tuple[str, str | None]:
        """The parameter's name, and the pattern of the converter that its values pass through."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, prefix, self.state
        )
        if name not in self.state and key in self.state:  # it has the parameter's name already
            return rename_source_key(key, [], [], prefix, self.state)
        return name, pattern

    def converter(self, pattern: str) -> WeightConverter:
        """The one that has a source pattern; the last, as transformers takes it."""
        return [each for each in self._converters if pattern in each.source_patterns][-1]


@dataclass(frozen=True)
class Converted(Source):
    """One of the parameters that a converter makes of one or several stored tensors.

    parts: stored tensors, each with the converter's pattern that it matched, in order.
    first: the first of the parameters, which stands for the conversion.
    """

    name: str
    first: str
    converter: WeightConverter
    parts: tuple[tuple[str, Source], ...]
    model: transformers.PreTrainedModel
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for _, part in self.parts for file in part.files)

    def read(self, files: WeightFiles) -> torch.Tensor:
        values = _convert(
            self.converter, self.first, self.parts, self.model, lambda part: part.read(files)
        )
        return checked(self, values[self.name])

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0][1]}{more}"


def parameters_of(stored: Mapping[str, Source], conversion: Conversion) -> dict[str, Source]:
    """The module's parameters that the stored tensors hold, by name.

    Raises CheckpointError for tensors that cannot be converted as transformers would.
    """
    parameters: dict[str, Source] = {}
    parts: dict[str, list[tuple[str, Source]]] = defaultdict(list)
    for key in sorted(stored, key=dot_natural_key):  # the order in which experts are merged
        name, pattern = conversion.rename(key)
        if name not in conversion.state:
            continue
        if pattern is None:
            parameters.setdefault(name, stored[key])
        else:
            parts[name].append((pattern, stored[key]))
    for first, collected in parts.items():
        parameters |= _converted(first, tuple(collected), conversion)
    return parameters


def complete(
    parameters: Mapping[str, Source], conversion: Conversion, where: Path
) -> tuple[dict[str, Source], dict[str, str]]:
    """The parameters without those that share another's values, and the names of these.

    Raises CheckpointError for parameters that are missing, or of another shape or type.
    """
    model = conversion.model
    found = {name: each for name, each in parameters.items() if name in conversion.state}
    tied = {
        target: source
        for target, source in (model.all_tied_weights_keys or {}).items()
        if target not in found or _same_values(found[target], found.get(source))
    }
    for target in tied:
        found.pop(target, None)
    for name, value in conversion.state.items():
        if name in tied:
            continue
        shape = tuple(value.shape)
        if name not in found:
            raise CheckpointError(
                f"{where} has no tensor for {name} {list(shape)}; "
                f"it is not a whole {type(model).__name__} checkpoint"
            )
        source = found[name]
        if source.shape != shape:
            raise CheckpointError(
                f"{source} has shape {list(source.shape)}; config.json asks for {list(shape)}"
            )
        if value.is_floating_point() and source.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{source} is stored as {str(source.dtype).removeprefix('torch.')}, and nothing in "
                f"config.json says how (quantization_config); {name} was expected in bfloat16, "
                "float16 or float32. Give the original checkpoint"
            )
    return found, tied


def _converted(
    first: str, parts: tuple[tuple[str, Source], ...], conversion: Conversion
) -> dict[str, Source]:
    """What a converter makes of its stored tensors; shapes and types come from meta tensors."""
    converter, model = conversion.converter(parts[0][0]), conversion.model
    try:
        described = _convert(
            converter,
            first,
            parts,
            model,
            lambda part: torch.empty(part.shape, dtype=part.dtype, device="meta"),
        )
    except Exception as error:  # an operation raises whatever torch does
        raise CheckpointError(
            f"{parts[0][1]} is stored in an older layout that cannot be converted to {first} "
            f"({' '.join(str(error).split())}); {len(parts)} tensors were found for it. Load the "
            "checkpoint with transformers and save it once, or fetch it again"
        ) from error
    return {
        name: Converted(name, first, converter, parts, model, tuple(value.shape), value.dtype)
        for name, value in described.items()
    }


def _convert(
    converter: WeightConverter,
    first: str,
    parts: Sequence[tuple[str, Source]],
    model: transformers.PreTrainedModel,
    read: Callable[[Source], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """A converter's parameters by name."""
    converter = deepcopy(converter)  # it collects what it is given
    for pattern, part in parts:
        converter.add_tensor(first, str(part), pattern, partial(read, part))  # type: ignore[arg-type]
    values = converter.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _same_values(one: Source, other: Source | None) -> bool:
    """Whether two sources are copies: some checkpoints store a tied parameter twice."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    files = WeightFiles()
    return torch.equal(one.read(files), other.read(files))
