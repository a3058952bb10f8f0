"""Write component graphs and the one weights file they share, streaming the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from glmcompile.artifact import WEIGHTS

INLINE_BYTES = 1024  # smaller tensors stay inside the graph
PAGE = 4096  # ONNX Runtime maps external data that starts at a page boundary
CACHE_LINE = 64


def save_components(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write `<component>.onnx` for each model and weights.bin for all of them.

    Tensors with the same bytes are stored once. The models are unchanged afterwards. Peak memory
    is one tensor at most (a 16 MB block of it where it comes straight from the checkpoint).
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / WEIGHTS).open("w+b") as file:
        writer = _WeightsWriter(file)
        for component, model in models.items():
            initializers = model.graph.initializers.values()
            kept = {value: value.const_value for value in initializers}
            try:
                for value, tensor in kept.items():
                    if tensor is not None and tensor.nbytes >= INLINE_BYTES:
                        value.const_value = writer.external(value, tensor, directory)
                ir.save(model, directory / f"{component}.onnx")
            finally:
                for value, tensor in kept.items():
                    value.const_value = tensor


class _WeightsWriter:
    """Appends tensors to weights.bin, remembering where each content lies."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._by_tensor: dict[Any, tuple[int, int]] = {}
        self._by_content: dict[bytes, tuple[int, int]] = {}
        self._held: list[ir.TensorProtocol] = []  # an id in _by_tensor is never reused

    def external(
        self, value: ir.Value, tensor: ir.TensorProtocol, directory: Path
    ) -> ir.ExternalTensor:
        offset, length = self._place(tensor)
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir=directory,
        )

    def _place(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        source = getattr(tensor, "source", id(tensor))
        if source in self._by_tensor:
            return self._by_tensor[source]
        self._held.append(tensor)
        end = self._file.seek(0, 2)
        alignment = PAGE if tensor.nbytes >= PAGE else CACHE_LINE
        offset = -(-end // alignment) * alignment
        self._file.write(bytes(offset - end))
        hashing = _Hashing(self._file)
        if hasattr(tensor, "tofile"):
            tensor.tofile(hashing)
        else:
            hashing.write(tensor.tobytes())
        place = (offset, tensor.nbytes)
        known = self._by_content.setdefault(hashing.digest(), place)
        if known != place:  # stored before under another name: take this copy back
            self._file.seek(end)
            self._file.truncate()
        self._by_tensor[source] = known
        return known


class _Hashing:
    """A file's write end that also hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()
