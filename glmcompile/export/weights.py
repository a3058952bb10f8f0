"""Weights as lazy onnx_ir tensors over the mapped checkpoint, converted to float32 when written."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from glmcompile.checkpoint import Checkpoint
from glmcompile.errors import ExportError


class CheckpointTensor(ir.LazyTensor):
    """A parameter in float32, read from the checkpoint each time it is needed and never kept.

    permutation: order of the stored axes before reshaping to `shape`, for weights whose columns
    the graph wants in another order; None keeps them.
    """

    __slots__ = ("checkpoint", "parameter", "permutation")

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameter: str,
        shape: Sequence[int] | None = None,
        permutation: Sequence[int] | None = None,
    ) -> None:
        stored = checkpoint.parameters[checkpoint.tied.get(parameter, parameter)]
        shape = stored.shape if shape is None else shape
        assert math.prod(shape) == math.prod(stored.shape)
        super().__init__(
            lambda: ir.Tensor(self._array()), ir.DataType.FLOAT, ir.Shape(shape), name=parameter
        )
        self.checkpoint = checkpoint
        self.parameter = parameter
        self.permutation = tuple(permutation) if permutation is not None else None

    @property
    def source(self) -> Hashable:
        """Equal for two tensors that hold the same values in the same order."""
        return (id(self.checkpoint), self.parameter, self.permutation)

    def reshaped(
        self, shape: Sequence[int], permutation: Sequence[int] | None = None
    ) -> CheckpointTensor:
        """The same parameter under another shape, its stored axes permuted first."""
        return CheckpointTensor(self.checkpoint, self.parameter, shape, permutation)

    def _array(self) -> np.ndarray:
        tensor = self.checkpoint.tensor(self.parameter).float()
        self.checkpoint.release()  # the pages that were read, so that they are not held twice
        if self.permutation is not None:
            tensor = tensor.permute(self.permutation)
        return tensor.contiguous().numpy().reshape(self.shape.numpy())

    def blocks(self) -> Iterator[np.ndarray]:
        """The values in order, in pieces small enough that the whole is never in memory."""
        if self.permutation is not None:
            yield self._array()
            return
        for rows in self.checkpoint.float32_rows(self.parameter):
            yield rows.contiguous().numpy()
        self.checkpoint.release()

    def tofile(self, file: Any) -> None:
        """Write the values to a binary file."""
        for block in self.blocks():
            file.write(block.tobytes())


def bind_weights(model: ir.Model, checkpoint: Checkpoint, component: str) -> None:
    """Give each parameter initializer its lazy value; tied parameters take one common name.

    Raises ExportError for an initializer that the checkpoint does not hold.
    """
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        if value.const_value is not None:  # a folded constant or a buffer
            continue
        if name not in checkpoint.parameters and name not in checkpoint.tied:
            raise ExportError(
                f"{component}: the graph reads the parameter {name}, which the checkpoint lacks"
            )
        value.const_value = CheckpointTensor(checkpoint, checkpoint.tied.get(name, name))
    for name, shared in checkpoint.tied.items():
        if name not in initializers:
            continue
        value = initializers[name]
        if shared in initializers:
            value.replace_all_uses_with(initializers[shared])
            del initializers[name]
        else:
            value.name = shared  # renames its entry among the initializers too
