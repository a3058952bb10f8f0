"""Write component graphs and the one weights file they share, a tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from glmcompile.artifact import WEIGHTS

INLINE_BYTES = 1024  # smaller constants stay inside the graph
PAGE = 4096  # ONNX Runtime maps external data that starts at a page boundary
CACHE_LINE = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in weights.bin, and their SHA-256."""

    offset: int
    length: int
    digest: str


def is_external(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor goes to weights.bin: all that is read lazily, and large constants."""
    return isinstance(tensor, ir.LazyTensor) or tensor.nbytes >= INLINE_BYTES


class WeightsWriter:
    """Appends tensors to a weights.bin that is open for reading and writing.

    Tensors with the same bytes are stored once. Peak memory is one tensor at most (a 16 MB block
    of it where it comes straight from the checkpoint).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._by_content: dict[str, Place] = {}

    def restore(self, places: Mapping[str, Place], end: int) -> None:
        """Go on behind what was written before: `places`, in a file of `end` bytes."""
        for place in places.values():
            self._by_content.setdefault(place.digest, place)
        self._file.truncate(end)

    @property
    def end(self) -> int:
        """Bytes written so far."""
        return self._file.seek(0, 2)

    def append(self, tensor: ir.TensorProtocol) -> Place:
        """Write a tensor where its content is not there yet, and say where it lies."""
        end = self.end
        alignment = PAGE if tensor.nbytes >= PAGE else CACHE_LINE
        offset = -(-end // alignment) * alignment
        self._file.write(bytes(offset - end))
        hashing = _Hashing(self._file)
        if hasattr(tensor, "tofile"):
            tensor.tofile(hashing)
        else:
            hashing.write(np.ascontiguousarray(tensor.numpy()).data)
        place = Place(offset, tensor.nbytes, hashing.hexdigest())
        known = self._by_content.setdefault(place.digest, place)
        if known != place:  # stored before under another name: take this copy back
            self._file.seek(end)
            self._file.truncate()
        self._file.flush()
        return known


def save_graph(model: ir.Model, places: Mapping[str, Place], file: Path) -> None:
    """Write a component's graph beside weights.bin, where initializers lie as `places` says.

    The model is unchanged afterwards.
    """
    kept = {value: value.const_value for value in model.graph.initializers.values()}
    try:
        for value, tensor in kept.items():
            if tensor is not None and is_external(tensor):
                value.const_value = _external(value, places[str(value.name)], file.parent)
        ir.save(model, file)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor


def _external(value: ir.Value, place: Place, directory: Path) -> ir.ExternalTensor:
    """An initializer's tensor as what lies at a place of weights.bin."""
    tensor = value.const_value
    assert tensor is not None
    return ir.ExternalTensor(
        WEIGHTS,
        place.offset,
        place.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
        base_dir=directory,
    )


def save_components(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write the graphs of whole components and weights.bin for all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / WEIGHTS).open("w+b") as file:
        writer = WeightsWriter(file)
        for component, model in models.items():
            places = {
                name: writer.append(value.const_value)
                for name, value in model.graph.initializers.items()
                if value.const_value is not None and is_external(value.const_value)
            }
            save_graph(model, places, directory / f"{component}.onnx")


class _Hashing:
    """A file's write end that also hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
