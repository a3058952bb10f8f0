"""Simplify a traced graph without touching weights: constants folded, shapes static, no no-ops."""

from __future__ import annotations

import logging
import re

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer, rewriter

from glmcompile.export.packed_projection import SplitPackedProjection


def simplify(model: ir.Model) -> None:
    """Run onnxscript's optimizer and the passes here until the graph is plain.

    Requires: parameters are initializers without a value, so nothing can fold or copy them.
    """
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every initializer without a value
    try:
        # Folding first: most of the tracer's nodes compute shapes, and the rewrites are slow.
        optimizer.fold_constants(model, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(model)
        ir.passes.Sequential(StaticReshapes(), SplitPackedProjection(), RemoveNoOps())(model)
        optimizer.remove_unused_nodes(model)
        rewriter.rewrite(model)
        optimizer.optimize_ir(model, num_iterations=1)
        RemoveNoOps()(model)  # the rewrites join reshapes, some to nothing
    finally:
        log.setLevel(level)


class StaticReshapes(ir.passes.InPlacePass):
    """Give Reshape a constant target wherever at most one output dimension is dynamic.

    The exporter computes targets from other tensors' shapes at run time, although one -1 says it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.domain != "":
                continue
            shape, target = node.outputs[0].shape, node.inputs[1]
            if shape is None or target is None or target.const_value is not None:
                continue
            sizes = [size if isinstance(size, int) else -1 for size in shape]
            if sizes.count(-1) > 1 or 0 in sizes:
                continue
            constant = ir.node("Constant", [], {"value": ir.tensor(np.array(sizes, np.int64))})
            constant.outputs[0].const_value = constant.attributes["value"].as_tensor()
            model.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.attributes.pop("allowzero", None)
            modified = True
        return ir.passes.PassResult(model, modified)


class RemoveNoOps(ir.passes.InPlacePass):
    """Remove Expand, Reshape and Cast to what the input is already, and undone rearrangements."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain != "" or not node.inputs or node.inputs[0] is None:
                continue
            source, output = _rearranged_from(node), node.outputs[0]
            same_shape = source.shape is not None and source.shape == output.shape
            same_type = source.dtype is not None and source.dtype == output.dtype
            no_op = (node.op_type in ("Expand", "Reshape") and same_shape) or (
                node.op_type == "Cast" and same_type
            )
            no_op = no_op or (source is not node.inputs[0] and same_shape)
            if no_op and not output.is_graph_output():
                output.replace_all_uses_with(source)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _rearranged_from(node: ir.Node) -> ir.Value:
    """What a node's input was before the node before rearranged it, if this node undoes that."""
    source = node.inputs[0]
    assert source is not None
    before = source.producer()
    if before is None or before.inputs == () or before.inputs[0] is None:
        return source
    if (before.op_type, node.op_type) == ("Unsqueeze", "Squeeze"):
        return before.inputs[0]
    if before.op_type == node.op_type == "Transpose":
        first, second = (list(n.attributes.get_ints("perm", [])) for n in (before, node))
        if [first[axis] for axis in second] == list(range(len(first))):
            return before.inputs[0]
    return source


class NameDimensions(ir.passes.InPlacePass):
    """Give inputs the shapes of the component's signature, and the tracer's symbols its names.

    The tracer knows dimensions as "s89", or as fixed where only an operator sees them.
    """

    def __init__(self, inputs: dict[str, tuple[int | str, ...]]) -> None:
        self.inputs = inputs

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names: dict[str, str] = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            for traced, wanted in zip(value.shape, self.inputs[str(value.name)], strict=True):
                if isinstance(traced, ir.SymbolicDim) and isinstance(wanted, str):
                    names[str(traced.value)] = wanted
            value.shape = ir.Shape(self.inputs[str(value.name)])
        values = [*model.graph.outputs, *(out for node in model.graph for out in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape(
                    [
                        re.sub(r"\w+", lambda m: names.get(m[0], m[0]), str(d.value))
                        if isinstance(d, ir.SymbolicDim) and d.value is not None
                        else d
                        for d in value.shape
                    ]
                )
        return ir.passes.PassResult(model, True)
