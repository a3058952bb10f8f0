"""Convolutions that see each input once are linear layers: patch embedding, downsampling."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from glmcompile.export.linear import DOMAIN, linear_node, module_name, replace_node
from glmcompile.export.weights import CheckpointTensor


class ConvolutionToLinear(ir.passes.InPlacePass):
    """Rewrite Conv over exactly one window, with its Reshape and Transpose, into Linear.

    Requires: the weight is bound to the checkpoint; input and output shapes are known but for the
    leading dimension. Ensures: the weight is [out, in], its columns in the order in which the
    input lies in memory, so the activations need no Transpose. Exact: the same products are
    summed, in another order.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Conv" and node.domain == "":
                modified |= _rewrite(model.graph, node)
        if modified:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def _rewrite(graph: ir.Graph, conv: ir.Node) -> bool:
    x, weight = conv.inputs[:2]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if x is None or weight is None or not isinstance(weight.const_value, CheckpointTensor):
        return False
    kernel = weight.const_value.shape.numpy()
    if not _one_window(conv, x, kernel):
        return False
    permutation = None
    transpose = x.producer()
    if transpose is not None and transpose.op_type == "Transpose" and x.shape is not None:
        order = list(transpose.attributes.get_ints("perm", []))
        if order[0] != 0:
            return False
        # Axis i of the convolution's input is axis order[i] of the stored one.
        permutation = [0, *(order.index(axis) for axis in range(1, len(order)))]
        assert transpose.inputs[0] is not None
        x = transpose.inputs[0]
    flattened = (kernel[0], math.prod(kernel[1:]))
    weight.const_value = weight.const_value.reshaped(flattened, permutation)
    weight.shape = ir.Shape(flattened)

    rows = _as_rows(graph, conv, x, flattened[1])
    last, output = _flat_output(graph, conv, kernel[0])
    linear = linear_node(rows, weight, bias, output, module_name(weight))
    replace_node(graph, last, linear)
    if last is not conv:
        graph.remove(conv, safe=True)
    if permutation is not None and transpose is not None and not transpose.outputs[0].uses():
        graph.remove(transpose, safe=True)
    return True


def _one_window(conv: ir.Node, x: ir.Value, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel covers the whole input, without padding, groups or dilation."""
    attributes = conv.attributes
    return (
        x.shape is not None
        and tuple(x.shape[1:]) == kernel[1:]
        and attributes.get_int("group", 1) == 1
        and not any(attributes.get_ints("pads", []))
        and all(step == 1 for step in attributes.get_ints("dilations", []))
    )


def _as_rows(graph: ir.Graph, before: ir.Node, x: ir.Value, width: int) -> ir.Value:
    """x as [windows, width]: what it was reshaped from if that is such rows, else reshaped."""
    windows = x.shape[0] if x.shape is not None else None
    source = x.producer()
    if source is not None and source.op_type == "Reshape" and source.inputs[0] is not None:
        x = source.inputs[0]
    if x.shape is not None and len(x.shape) == 2 and x.shape[1] == width:
        return x
    target = ir.node("Constant", [], {"value": ir.tensor(np.array([-1, width], np.int64))})
    reshape = ir.node("Reshape", [x, target.outputs[0]])
    reshape.outputs[0].type = x.type
    reshape.outputs[0].shape = ir.Shape([windows, width])
    graph.insert_before(before, [target, reshape])
    return reshape.outputs[0]


def _flat_output(graph: ir.Graph, conv: ir.Node, channels: int) -> tuple[ir.Node, ir.Value]:
    """The node and value where the output's unit axes are gone: the Reshape after the Conv, made
    together with one back to these axes where there is none."""
    output = conv.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Reshape":
        flat = uses[0].node.outputs[0]
        if flat.shape is not None and len(flat.shape) == 2:
            return uses[0].node, flat
    axes = [1] * (len(conv.inputs[1].shape or ()) - 2)  # type: ignore[union-attr]
    flat_node, back = (_reshape_node(output, [-1, channels, *each]) for each in ([], axes))
    back.outputs[0].shape, back.outputs[0].type = output.shape, output.type
    output.replace_all_uses_with(back.outputs[0])
    flat_node.replace_input_with(0, output)
    back.replace_input_with(0, flat_node.outputs[0])
    windows = output.shape[0] if output.shape is not None else None
    flat_node.outputs[0].shape = ir.Shape([windows, channels])
    flat_node.outputs[0].type = output.type
    targets = [each.inputs[1].producer() for each in (flat_node, back)]  # type: ignore[union-attr]
    graph.insert_after(conv, [targets[0], flat_node, targets[1], back])  # type: ignore[list-item]
    return flat_node, flat_node.outputs[0]


def _reshape_node(x: ir.Value, sizes: list[int]) -> ir.Node:
    target = ir.node("Constant", [], {"value": ir.tensor(np.array(sizes, np.int64))})
    return ir.node("Reshape", [x, target.outputs[0]])
