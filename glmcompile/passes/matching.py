"""Small questions that rewrites ask of a graph: producers, constants, slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

DOMAIN = "com.glmcompile"


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value` if its operator is one of `op_types`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a small constant or initializer, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None or tensor.size > 4096 else tensor.numpy()


def width(value: ir.Value) -> int | None:
    """Size of the last axis where it is known."""
    if value.shape is None or len(value.shape) == 0:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def through(value: ir.Value, *op_types: str) -> ir.Value:
    """The value reached by walking up while the producer is one of `op_types`."""
    while (node := producer(value, *op_types)) is not None:
        source = node.inputs[0]
        assert source is not None
        value = source
    return value


@dataclass(frozen=True)
class LastAxisSlice:
    """`source[..., start:stop:step]`; stop is clipped to the width."""

    source: ir.Value
    start: int
    stop: int
    step: int


def last_axis_slice(value: ir.Value | None) -> LastAxisSlice | None:
    """Read `value` as a slice of its producer's input along the last axis (from Slice or Split)."""
    node = producer(value, "Slice", "Split")
    if node is None or value is None:
        return None
    source = node.inputs[0]
    if source is None or source.shape is None or (size := width(source)) is None:
        return None
    rank = len(source.shape)
    if node.op_type == "Split":
        if integer(node, "axis", 0) % rank != rank - 1:
            return None
        widths = [width(output) for output in node.outputs]
        if any(each is None for each in widths):
            return None
        index = list(node.outputs).index(value)
        start = sum(each for each in widths[:index] if each is not None)
        return LastAxisSlice(source, start, start + (widths[index] or 0), 1)
    arrays = [constant(each) for each in node.inputs[1:]]
    if any(each is None or each.size != 1 for each in arrays):
        return None
    numbers = [int(each.item()) for each in arrays if each is not None]
    start, stop = numbers[0], numbers[1]
    axis = numbers[2] if len(numbers) > 2 else 0
    step = numbers[3] if len(numbers) > 3 else 1
    if axis % rank != rank - 1 or step < 1:
        return None
    bound = [min(max(each + size if each < 0 else each, 0), size) for each in (start, stop)]
    return LastAxisSlice(source, bound[0], bound[1], step)


def dimensions(value: ir.Value) -> list[int]:
    """The shape of a value whose axes are all known."""
    assert value.shape is not None
    return [int(size) for size in value.shape.numpy()]


def lazy_initializer(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    read: Callable[[], np.ndarray],
) -> ir.Value:
    """Register an initializer whose array is computed when it is read."""
    dimensions = ir.Shape(shape)
    tensor = ir.LazyTensor(lambda: ir.Tensor(read()), dtype=dtype, shape=dimensions, name=name)
    value = ir.Value(name=name, shape=dimensions, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def describe(new: ir.Value, like: ir.Value) -> None:
    """Give `new` the type and shape of `like`."""
    new.type, new.shape = like.type, like.shape


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every consumer of `old` read `new`, which also takes its name.

    A value keeps its name through every rewrite, so that graphs of one component, before and after,
    can be cut at the same values.
    """
    name, old.name = old.name, f"{old.name}.replaced"
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
