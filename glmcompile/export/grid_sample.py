"""Resampling of a learned position embedding as one small matrix product instead of GridSample."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

CUBIC_A = -0.75  # the coefficient of the cubic convolution kernel in torch and in ONNX


class GridSampleToMatMul(ir.passes.InPlacePass):
    """Rewrite GridSample of a [side * side, width] embedding table at one point per row.

    Requires: mode cubic, padding border, align_corners 0; the table goes in through Reshape,
    Transpose and Unsqueeze, and the result comes out as [points, width]. Ensures: a MatMul of each
    point's [side * side] interpolation weights with the table itself: rows times columns, each
    from the cubic convolution kernel (Keys, "Cubic Convolution Interpolation for Digital Image
    Processing", 1981). GridSample would gather 16 strided values for every number of the result
    and leave it transposed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "GridSample" and node.domain == "":
                modified |= _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _rewrite(graph: ir.Graph, sample: ir.Node) -> bool:
    attributes = sample.attributes
    if (
        attributes.get_string("mode", "") != "cubic"
        or attributes.get_string("padding_mode", "") != "border"
        or attributes.get_int("align_corners", 0) != 0
    ):
        return False
    image, grid = sample.inputs
    assert image is not None
    assert grid is not None
    table = _source(image, ("Unsqueeze", "Transpose", "Reshape"))
    points = _source(grid, ("Unsqueeze",))
    last = _sink(sample.outputs[0], ("Squeeze", "Squeeze", "Transpose"))
    if image.shape is None or table.shape is None or last is None or not table.is_initializer():
        return False
    height, width = image.shape[2], image.shape[3]
    if (
        not isinstance(height, int)
        or height != width
        or table.shape[0] != height**2
        or len(points.shape or ()) != 2
    ):
        return False

    tape = ir.tape.Tape()
    weights = _axis_weights(tape, points, height)
    # Points are (x, y), the table is row by row: y picks the row.
    columns, rows = (
        tape.op("Gather", [weights, _constant(tape, axis)], attributes={"axis": 1})
        for axis in (0, 1)
    )
    product = tape.op(
        "Mul",
        [
            tape.op("Unsqueeze", [rows, _constant(tape, [2])]),
            tape.op("Unsqueeze", [columns, _constant(tape, [1])]),
        ],
    )
    flat = tape.op("Reshape", [product, _constant(tape, [-1, height**2])])
    result = tape.op("MatMul", [flat, table])
    old = last.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, last, [last], list(tape.nodes), [old], [result])
    return True


def _axis_weights(tape: ir.tape.Tape, points: ir.Value, side: int) -> ir.Value:
    """Weight of each of an axis' `side` cells for each point and axis: [points, 2, side].

    A point between cells takes its 4 neighbours; neighbours beyond the border count as the border
    cell, so the kernel is evaluated on 2 more cells at each end and those are added to it.
    """
    cells = np.arange(-2, side + 2)
    to_border = np.zeros((len(cells), side), np.float32)
    to_border[np.arange(len(cells)), np.clip(cells, 0, side - 1)] = 1
    coordinates = tape.op("Unsqueeze", [points, _constant(tape, [2])])
    # From [-1, 1] to cells, the centres of the outer cells half a cell inside (align_corners = 0).
    position = tape.op("Mul", [coordinates, _constant(tape, side / 2)])
    position = tape.op("Add", [position, _constant(tape, (side - 1) / 2)])
    offset = tape.op("Sub", [position, _constant(tape, cells.astype(np.float32))])
    distance = tape.op("Abs", [offset])
    one, two = _constant(tape, 1.0), _constant(tape, 2.0)
    near = _polynomial(tape, distance, [CUBIC_A + 2, -(CUBIC_A + 3), 0.0, 1.0])
    far = _polynomial(tape, distance, [CUBIC_A, -5 * CUBIC_A, 8 * CUBIC_A, -4 * CUBIC_A])
    outside = tape.op("Where", [tape.op("Less", [distance, two]), far, _constant(tape, 0.0)])
    kernel = tape.op("Where", [tape.op("LessOrEqual", [distance, one]), near, outside])
    return tape.op("MatMul", [kernel, _constant(tape, to_border)])


def _polynomial(tape: ir.tape.Tape, x: ir.Value, coefficients: list[float]) -> ir.Value:
    """Horner's rule, the highest power first."""
    value = tape.op("Mul", [x, _constant(tape, coefficients[0])])
    for index, coefficient in enumerate(coefficients[1:], start=1):
        if coefficient:
            value = tape.op("Add", [value, _constant(tape, coefficient)])
        if index < len(coefficients) - 1:
            value = tape.op("Mul", [value, x])
    return value


def _constant(tape: ir.tape.Tape, value: int | float | list[int] | np.ndarray) -> ir.Value:
    array = np.array(value, np.int64 if isinstance(value, (int, list)) else np.float32)
    return tape.op("Constant", [], attributes={"value": ir.tensor(array)})


def _source(value: ir.Value, op_types: tuple[str, ...]) -> ir.Value:
    """Follow a value's producers back through nodes of these types, in any order."""
    node = value.producer()
    while node is not None and node.op_type in op_types and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _sink(value: ir.Value, op_types: tuple[str, ...]) -> ir.Node | None:
    """The last of a chain of single consumers of exactly these types."""
    node = None
    for op_type in op_types:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            return None
        node = uses[0].node
        value = node.outputs[0]
    return node
