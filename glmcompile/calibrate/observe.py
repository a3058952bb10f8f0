"""Adds observers to a graph: the largest magnitude per channel of what quantization will round."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, dimensions, width

PREFIX = "observed."


class Observe(ir.passes.InPlacePass):
    """Requires Linear and PagedAttention nodes with separate keys and values.

    Ensures one graph output `observed.<name>`, float32 `[channels]`, for the input of each linear
    layer (`<layer>.input`) and the keys and values of each attention (`key.<n>`, `value.<n>`);
    `[experts, channels]` for the tokens that each expert of a mixture got (`<layer>.input`).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        tape = ir.tape.Tape(graph)
        attention = 0
        for node in list(graph):
            if node.op_type == "Linear" and node.domain == DOMAIN:
                _observe(graph, tape, node.inputs[0], f"{node.name}.input")
            elif node.op_type == "MoE" and node.domain == DOMAIN:
                _observe_experts(graph, tape, node)
            elif node.op_type == "PagedAttention":
                _observe(graph, tape, node.inputs[1], f"key.{attention}")
                _observe(graph, tape, node.inputs[2], f"value.{attention}")
                attention += 1
        common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _observe_experts(graph: ir.Graph, tape: ir.tape.Tape, node: ir.Node) -> None:
    """Largest magnitudes of each expert's tokens; zeros for one that gets none."""
    x, chosen, up = node.inputs[0], node.inputs[1], node.inputs[3]
    assert x is not None and chosen is not None and up is not None
    count, choices, channels = dimensions(up)[0], width(chosen), width(x)
    assert choices is not None and channels is not None

    def reshaped(value: ir.Value, *sizes: int) -> ir.Value:
        shape = tape.op("Constant", [], attributes={"value_ints": list(sizes)})
        return tape.op("Reshape", [value, shape])

    # Each token once for each of its choices.
    repeats = tape.op("Constant", [], attributes={"value_ints": [1, choices, 1]})
    rows = tape.op("Tile", [reshaped(tape.op("Abs", [x]), -1, 1, channels), repeats])
    zeros = ir.tensor(np.zeros((count, channels), np.float32))
    largest = tape.op(
        "ScatterND",
        [
            tape.op("Constant", [], attributes={"value": zeros}),
            reshaped(chosen, -1, 1),
            reshaped(rows, -1, channels),
        ],
        attributes={"reduction": "max"},
    )
    largest.name = PREFIX + experts_observation(up)
    largest.dtype, largest.shape = ir.DataType.FLOAT, ir.Shape([count, channels])
    graph.outputs.append(largest)


def experts_observation(up: ir.Value) -> str:
    """Of a mixture's experts, by the name of their first layer's weight."""
    return f"{str(up.name).rpartition('.')[0]}.input"


def _observe(graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value | None, name: str) -> None:
    assert value is not None
    channels = width(value)
    assert channels is not None, f"{name}: unknown width"
    shape = tape.op("Constant", [], attributes={"value_ints": [-1, channels]})
    axes = tape.op("Constant", [], attributes={"value_ints": [0]})
    rows = tape.op("Reshape", [tape.op("Abs", [value]), shape])
    largest = tape.op("ReduceMax", [rows, axes], attributes={"keepdims": 0})
    largest.name = PREFIX + name
    largest.dtype, largest.shape = ir.DataType.FLOAT, ir.Shape([channels])
    graph.outputs.append(largest)
