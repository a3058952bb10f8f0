"""GGUF tensors as the parameters of a transformers module.

Names and layouts are transformers' (modeling_gguf_pytorch_utils.py and integrations/gguf).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from glmcompile.checkpoint.conversions import Conversion, parameters_of
from glmcompile.checkpoint.gguf.metadata import architecture_of
from glmcompile.checkpoint.gguf.tensors import GgufTensor, tensors_of
from glmcompile.checkpoint.sources import Source, WeightFiles, checked
from glmcompile.errors import CheckpointError, UnsupportedArchitectureError

WHOLE_TYPES = ("F32", "F16", "BF16", "F64")  # those that hold values and no blocks


@dataclass(frozen=True)
class Processed(Source):
    """A parameter that one of transformers' tensor processors makes of GGUF tensors.

    names: of the tensors in the file -> of the parameters, as transformers maps them.
    """

    name: str
    parts: tuple[GgufTensor, ...]
    processor: TensorProcessor
    names: dict[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return self.parts[0].files

    def read(self, files: WeightFiles) -> torch.Tensor:
        parsed: dict[str, Any] = {"tensors": {}}  # where processors put what they merge
        for part in self.parts:
            result = self._process(part, part.read(files).numpy(), parsed)
            if (name := self.names.get(result.name or "")) is not None:
                parsed["tensors"][name] = torch.from_numpy(result.weights)
        return checked(self, parsed["tensors"][self.name])

    def rows(self, files: WeightFiles, count: int) -> Iterator[torch.Tensor]:
        part = self.parts[0]
        nothing = np.broadcast_to(np.float32(1), part.shape)
        whole = len(self.parts) > 1 or part.shape != self.shape
        if whole or self._process(part, nothing, {"tensors": {}}).weights is not nothing:
            yield from super().rows(files, count)
        else:  # the processor leaves it as it is
            yield from part.rows(files, count)

    def _process(self, part: GgufTensor, weights: NDArray[Any], parsed: dict[str, Any]) -> Any:
        return self.processor.process(
            weights=weights,
            name=part.key,
            tensor_key_mapping=self.names,
            parsed_parameters=parsed,
        )

    def __str__(self) -> str:
        return " and ".join(str(part) for part in self.parts)


def parameters(
    file: Path, network: transformers.PreTrainedModel
) -> tuple[dict[str, Source], list[str]]:
    """A module's parameters by name, and notes for the user.

    Raises CheckpointError for damaged files and tensors that are not of the parameter's size.
    """
    tensors, architecture = tensors_of(file), architecture_of(file)
    if is_gguf_arch_supported(architecture):
        transforms = get_gguf_conversion_mapping(architecture, network.config)
        found = parameters_of(dict(tensors), Conversion(network, transforms))
    else:
        found = _processed(tensors, architecture, network)
    return found, _notes(file, tensors)


def _processed(
    tensors: dict[str, GgufTensor], architecture: str, network: transformers.PreTrainedModel
) -> dict[str, Source]:
    """Parameters of an architecture whose tensors transformers' processors take."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(network.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(network, processor)
    except NotImplementedError as error:
        raise UnsupportedArchitectureError(
            f"the `gguf` package has no tensor names for {type(network).__name__} ({error})"
        ) from error
    parts: dict[str, list[GgufTensor]] = defaultdict(list)
    for key, tensor in tensors.items():
        # Merged experts are mapped without the suffix.
        name = names.get(key, names.get(key.removesuffix(".weight")))
        if name is not None:
            parts[name].append(tensor)
    found: dict[str, Source] = {}
    for name, value in network.state_dict().items():
        if name not in parts:
            continue
        held = sum(np.prod(part.shape, dtype=np.int64) for part in parts[name])
        if held != value.numel():
            raise CheckpointError(
                f"{' and '.join(map(str, parts[name]))} hold {held} values; the file's metadata "
                f"asks for {value.numel()} in {name}. It is damaged; fetch it again"
            )
        shape = tuple(value.shape)
        found[name] = Processed(name, tuple(parts[name]), processor, names, shape)
    return found


def _notes(file: Path, tensors: dict[str, GgufTensor]) -> list[str]:
    kinds = Counter(tensor.kind.name for tensor in tensors.values())
    blocks = {kind: count for kind, count in kinds.most_common() if kind not in WHOLE_TYPES}
    if not blocks:
        return []
    listed = ", ".join(f"{count} in {kind}" for kind, count in blocks.items())
    return [
        f"{file.name}: {sum(blocks.values())} of {len(tensors)} tensors are quantized ({listed}). "
        "They are compiled from their dequantized values: what that quantization lost stays lost, "
        "and accuracy is measured against it. The original checkpoint gives a more exact engine."
    ]
