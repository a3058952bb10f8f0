"""Adds observers to a graph: the largest magnitude per channel of what quantization will round."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, width

PREFIX = "observed."


class Observe(ir.passes.InPlacePass):
    """Requires Linear and PagedAttention nodes with separate keys and values.

    Ensures one graph output `observed.<name>`, float32 `[channels]`, for the input of each linear
    layer (`<layer>.input`) and the keys and values of each attention (`key.<n>`, `value.<n>`).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        tape = ir.tape.Tape(graph)
        attention = 0
        for node in list(graph):
            if node.op_type == "Linear" and node.domain == DOMAIN:
                _observe(graph, tape, node.inputs[0], f"{node.name}.input")
            elif node.op_type == "PagedAttention":
                _observe(graph, tape, node.inputs[1], f"key.{attention}")
                _observe(graph, tape, node.inputs[2], f"value.{attention}")
                attention += 1
        common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=True)


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
