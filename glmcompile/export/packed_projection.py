"""Queries, keys and values projected together and cut apart without a transpose."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class SplitPackedProjection(ir.passes.InPlacePass):
    """Rewrite Transpose(Reshape(x, [-1, n, heads, size])) cut along axis 0 into Split of x.

    Vision encoders project query, key and value at once and unbind them from [n, tokens, heads,
    size], a copy of everything. Ensures: x [tokens, n * heads * size] is split in n and each part
    reshaped to [tokens, heads, size], which moves nothing twice.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Transpose" and node.domain == "":
                modified |= _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _rewrite(graph: ir.Graph, transpose: ir.Node) -> bool:
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if (
        list(transpose.attributes.get_ints("perm", [])) != [1, 0, 2, 3]
        or reshape is None
        or reshape.op_type != "Reshape"
        or reshape.inputs[0] is None
    ):
        return False
    packed, shape = reshape.inputs[0], reshape.outputs[0].shape
    if shape is None or packed.shape is None or len(packed.shape) != 2:
        return False
    if not all(isinstance(side, int) for side in shape[1:]):
        return False
    count, heads, size = (side for side in shape[1:] if isinstance(side, int))
    parts = [_part(use.node) for use in transpose.outputs[0].uses()]
    found = sorted((part for part in parts if part is not None), key=lambda part: part[0])
    if [index for index, _ in found] != list(range(count)) or len(parts) != count:
        return False

    split = ir.node("Split", [packed], {"axis": 1, "num_outputs": count}, num_outputs=count)
    target = ir.node("Constant", [], {"value": ir.tensor(np.array([-1, heads, size], np.int64))})
    # The optimizer evaluates constants it knows the values of.
    target.outputs[0].const_value = target.attributes["value"].as_tensor()
    graph.insert_before(transpose, [split, target])
    for output, (_, squeeze) in zip(split.outputs, found, strict=True):
        output.type, output.shape = packed.type, ir.Shape([packed.shape[0], heads * size])
        part = ir.node("Reshape", [output, target.outputs[0]])
        old, new = squeeze.outputs[0], part.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_nodes_and_values(graph, squeeze, [squeeze], [part], [old], [new])
    return True


def _part(cut: ir.Node) -> tuple[int, ir.Node] | None:
    """(index, Squeeze) where `cut` is Slice [index : index + 1] of axis 0 followed by Squeeze."""
    if cut.op_type != "Slice" or len(cut.inputs) < 4:
        return None
    bounds = [ir.convenience.get_const_tensor(value) for value in cut.inputs[1:4] if value]
    uses = list(cut.outputs[0].uses())
    if len(bounds) != 3 or any(bound is None for bound in bounds) or len(uses) != 1:
        return None
    start, stop, axis = (int(bound.numpy().item()) for bound in bounds if bound is not None)
    if stop != start + 1 or axis != 0 or uses[0].node.op_type != "Squeeze":
        return None
    return start, uses[0].node
