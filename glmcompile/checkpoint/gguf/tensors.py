"""The tensors of a GGUF file, dequantized one at a time by the `gguf` package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray
from transformers.integrations.gguf import GgufHeader

from glmcompile.checkpoint.sources import Source, WeightFiles
from glmcompile.errors import CheckpointError


@dataclass(frozen=True)
class GgufTensor(Source):
    """A tensor of a GGUF file, whose blocks are dequantized when it is read.

    kind: how it is stored; offset: of its first byte in the file. shape: as torch has it.
    """

    file: Path
    key: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    dtype: torch.dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self, files: WeightFiles) -> torch.Tensor:
        return torch.from_numpy(dequantize(self._stored(), self.kind))

    def rows(self, files: WeightFiles, count: int) -> Iterator[torch.Tensor]:
        if len(self.shape) < 2:  # bytes of a row cannot be told apart by rows
            yield from super().rows(files, count)
            return
        stored = self._stored()
        for start in range(0, len(stored), count):
            yield torch.from_numpy(dequantize(stored[start : start + count], self.kind))

    def _stored(self) -> NDArray[np.uint8]:
        shape = quant_shape_to_byte_shape(self.shape, self.kind)
        # Copied on write: values that are stored as float32 are used where they lie.
        return np.memmap(self.file, np.uint8, "c", self.offset, shape)

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


def tensors_of(file: Path) -> dict[str, GgufTensor]:
    """Every tensor by its name in the file. Raises CheckpointError for a file that is cut off."""
    try:
        described = _described(file)
    except (ValueError, OSError, IndexError, KeyError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is not a whole GGUF file ({error}); fetch it again"
        ) from error
    size = file.stat().st_size
    for tensor in described:
        end = tensor.offset + int(
            np.prod(quant_shape_to_byte_shape(tensor.shape, tensor.kind), dtype=np.int64)
        )
        if end > size:
            raise CheckpointError(
                f"{tensor} ends at byte {end}, but the file has {size}; fetch it again"
            )
    return {tensor.key: tensor for tensor in described}


def _described(file: Path) -> list[GgufTensor]:
    try:
        header = GgufHeader.from_file(str(file))
    except ValueError:  # a type that transformers does not unpack; this reader takes a while
        return [
            GgufTensor(
                file,
                each.name,
                each.tensor_type,
                tuple(int(size) for size in reversed(each.shape)),
                int(each.data_offset),
            )
            for each in GGUFReader(file).tensors
        ]
    return [
        GgufTensor(
            file,
            info.name,
            GGMLQuantizationType(info.ggml_type),
            info.shape,
            header.data_start + info.offset,
        )
        for info in header.tensors
    ]
