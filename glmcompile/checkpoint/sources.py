"""How a parameter's values come out of the weight files, one parameter at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from glmcompile.errors import CheckpointError

# What values may be stored as and pass for a parameter; all others need a dequantizer.
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class WeightFiles:
    """The safetensors files that are mapped at the moment."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def tensor(self, file: Path, key: str) -> torch.Tensor:
        """A tensor as stored; its pages are read when used."""
        if file not in self._open:
            self._open[file] = safetensors.safe_open(file, framework="pt")
        return self._open[file].get_tensor(key)

    def release(self) -> None:
        """Unmap the files; tensors that are still held stay valid."""
        self._open.clear()


class Source(ABC):
    """Where the values of one tensor come from. Nothing is read until `read`.

    shape, dtype: of what `read` gives.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that it reads."""

    @abstractmethod
    def read(self, files: WeightFiles) -> torch.Tensor:
        """The values, of `shape` and `dtype`."""

    def rows(self, files: WeightFiles, count: int) -> Iterator[torch.Tensor]:
        """The values in blocks of `count` along the first axis."""
        yield from self.read(files).split(count)

    @abstractmethod
    def __str__(self) -> str:
        """File and name there, as a message names it."""


@dataclass(frozen=True)
class StoredTensor(Source):
    """A tensor where it lies: safetensors file, name there, type and shape."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self, files: WeightFiles) -> torch.Tensor:
        return files.tensor(self.file, self.key)

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


@dataclass(frozen=True)
class Dequantized(Source):
    """A weight computed from the several tensors that a quantized layer is stored as.

    parts: by the argument of `unpack` that each is given as.
    """

    parts: Mapping[str, Source]
    unpack: Callable[..., torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for part in self.parts.values() for file in part.files)

    def read(self, files: WeightFiles) -> torch.Tensor:
        value = self.unpack(**{role: part.read(files) for role, part in self.parts.items()})
        return checked(self, value)

    def __str__(self) -> str:
        return str(next(iter(self.parts.values())))


def checked(source: Source, value: torch.Tensor) -> torch.Tensor:
    """A value that was computed, whose shape must be the source's. Raises CheckpointError."""
    if tuple(value.shape) != source.shape:
        raise CheckpointError(
            f"{source} gives {list(value.shape)}; {list(source.shape)} was expected. "
            "Its file does not belong to this configuration; fetch the checkpoint again"
        )
    return value
