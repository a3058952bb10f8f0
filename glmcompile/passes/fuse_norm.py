"""Moves the RMS normalization in front of a quantized linear layer into the layer's own node.

The layer reads every row to find its range, and the sum of squares comes with it for nothing. The
normalization's weight joins the factor of each channel; the row's factor joins the row's scale.
"""

from __future__ import annotations

import onnx_ir as ir

from glmcompile.passes.matching import DOMAIN, integer, lazy_initializer, producer

# Inputs of LinearW8A8.
X, INPUT_SCALE = 0, 6
DEFAULT_EPSILON = 1e-5  # of RMSNormalization


class FuseNorm(ir.passes.InPlacePass):
    """Requires `com.glmcompile::LinearW8A8` with dynamic ranges.

    Ensures that none of them reads an RMSNormalization over the last axis, or rows selected from
    one, that serves nothing else.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [n for n in model.graph if n.op_type == "LinearW8A8" and n.domain == DOMAIN]
        fused = [_fuse(model.graph, node) for node in nodes]
        return ir.passes.PassResult(model, modified=any(fused))


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    norm = _normalization(node.inputs[X])
    if norm is None:
        return False
    source, weight = norm.inputs
    assert source is not None and weight is not None
    epsilon = norm.attributes.get("epsilon")
    value = DEFAULT_EPSILON if epsilon is None else epsilon.as_float()
    node.attributes["rms_epsilon"] = ir.AttrFloat32("rms_epsilon", value)
    node.resize_inputs(max(len(node.inputs), INPUT_SCALE + 1))
    node.replace_input_with(INPUT_SCALE, _product(graph, weight, node.inputs[INPUT_SCALE]))
    norm.outputs[0].replace_all_uses_with(source)
    return True


def _normalization(x: ir.Value | None) -> ir.Node | None:
    """The normalization behind x; selecting rows may stand between, as it does not mix channels."""
    while x is not None and x.shape is not None and len(x.uses()) == 1:
        if (norm := producer(x, "RMSNormalization")) is not None:
            weight = norm.inputs[1]
            last = integer(norm, "axis", -1) in (-1, len(x.shape) - 1)
            return norm if last and weight is not None and weight.is_initializer() else None
        rows = producer(x, "Gather", "Squeeze")
        if rows is None or len(x.shape) < 2 or integer(rows, "axis", 0) != 0:
            return None
        x = rows.inputs[0]
    return None


def _product(graph: ir.Graph, weight: ir.Value, factor: ir.Value | None) -> ir.Value:
    """An initializer that multiplies both when it is read; the weight alone without a factor."""
    tensors = [value.const_value for value in (weight, factor) if value is not None]
    if len(tensors) == 1:
        return weight
    first, second = tensors
    assert first is not None and second is not None
    name = f"{weight.name}*{factor.name}"  # type: ignore[union-attr]
    return lazy_initializer(
        graph, name, first.dtype, [first.size], lambda: first.numpy() * second.numpy()
    )
