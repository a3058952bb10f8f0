"""Folds constants added to a parameter into it: Gemma's normalizations scale by 1 + weight."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import constant, dimensions, lazy_initializer


class FoldOffsets(ir.passes.InPlacePass):
    """Requires Add(parameter, scalar), the parameter an initializer of one axis.

    Ensures an initializer of the sum, computed when it is read, so that a normalization's scale is
    one value and is recognised.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [_fold(model.graph, node) for node in list(model.graph) if node.op_type == "Add"]
        if any(folded):
            common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=any(folded))


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    for weight, offset in (node.inputs, node.inputs[::-1]):
        if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 1:
            continue
        tensor, added = weight.const_value, constant(offset)
        if tensor is None or added is None or added.size != 1 or offset is weight:
            continue
        shift = np.float32(added.item())
        name = f"{weight.name}+{shift:g}"
        value = graph.initializers.get(name) or lazy_initializer(
            graph, name, tensor.dtype, dimensions(weight), partial(_sum, tensor, shift)
        )
        replaced = node.outputs[0]
        replaced.replace_all_uses_with(value)
        return True
    return False


def _sum(tensor: ir.TensorProtocol, shift: np.float32) -> np.ndarray:
    return tensor.numpy() + shift
