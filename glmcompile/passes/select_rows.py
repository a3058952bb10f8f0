"""Moves the choice of the rows that logits are wanted of in front of the last layer's own work.

Of a prompt only the last row is sampled from, so that everything behind the last attention that
treats rows apart (its output projection, the MLP, the final normalization) needs no other row.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import integer, producer, replace

# A row of their results depends on the same row of their inputs alone.
ROWWISE = {"Add", "Gelu", "Linear", "Mul", "Sigmoid", "Sub", "Tanh"}
ROWWISE_ON_LAST_AXIS = {
    "LayerNormalization": -1,
    "RMSNormalization": -1,
    "Split": 0,
}  # and their default axes


class SelectRows(ir.passes.InPlacePass):
    """Requires values [1, tokens, channels] of which `Squeeze` and `Gather` take some tokens.

    Ensures that nodes which treat tokens apart, and whose results nothing else reads, see only
    those tokens.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        gathers = [n for n in model.graph if n.op_type == "Gather" and integer(n, "axis", 0) == 0]
        selected = [_select(model.graph, gather) for gather in gathers]
        if any(selected):
            common_passes.RemoveUnusedNodesPass()(model)
            common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=any(selected))


def _select(graph: ir.Graph, gather: ir.Node) -> bool:
    squeeze = producer(gather.inputs[0], "Squeeze")
    rows = gather.inputs[1]
    if squeeze is None or len(squeeze.outputs[0].uses()) > 1 or not _has_tokens(squeeze.inputs[0]):
        return False
    nodes = [squeeze]
    for node in reversed(graph):
        if _is_rowwise(node) and _serves_only(nodes, node):
            nodes.append(node)
    chosen: dict[ir.Value, ir.Value] = {}
    tape = ir.tape.Tape(graph)
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or not _has_tokens(value) or value.producer() in nodes:
                continue
            if value not in chosen:
                chosen[value] = tape.op("Gather", [value, rows], attributes={"axis": 1})
                _set_tokens(chosen[value], gather, like=value)
            node.replace_input_with(index, chosen[value])
        for output in node.outputs if node is not squeeze else ():
            _set_tokens(output, gather, like=output)
    squeeze.outputs[0].shape = gather.outputs[0].shape
    replace(gather.outputs[0], squeeze.outputs[0])
    return True


def _is_rowwise(node: ir.Node) -> bool:
    if node.op_type in ROWWISE_ON_LAST_AXIS:
        axis = integer(node, "axis", ROWWISE_ON_LAST_AXIS[node.op_type])
        if axis not in (-1, 2):
            return False
    elif node.op_type not in ROWWISE:
        return False
    parameters = [value for value in node.inputs if value is not None and not _has_tokens(value)]
    return all(_has_tokens(output) for output in node.outputs) and all(
        (value.shape is not None and len(value.shape) < 3) or value.is_initializer()
        for value in parameters
    )


def _serves_only(nodes: list[ir.Node], node: ir.Node) -> bool:
    return all(
        not output.is_graph_output() and all(use.node in nodes for use in output.uses())
        for output in node.outputs
    )


def _has_tokens(value: ir.Value | None) -> bool:
    """Whether it is [1, tokens, channels], the number of tokens being known at run time."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return False
    return value.shape[0] == 1 and not isinstance(value.shape[1], int)


def _set_tokens(value: ir.Value, gather: ir.Node, like: ir.Value) -> None:
    assert like.shape is not None and gather.outputs[0].shape is not None
    value.type = like.type
    value.shape = ir.Shape([1, gather.outputs[0].shape[0], like.shape[2]])
