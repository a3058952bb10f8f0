"""Moves what follows a linear layer (activation, residual) into the layer's own node.

A kernel that still holds the sums in registers applies both for nothing; as nodes of their own they
read and write the whole activation again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, constant, describe, last_axis_slice, replace

# Rows of gate and up are interleaved in blocks of this many output channels.
SWIGLU_BLOCK = 16


class FuseEpilogue(ir.passes.InPlacePass):
    """Requires `com.glmcompile::Linear(x, weight, bias?)`; touches those that `selected` names.

    Ensures `Linear(x, weight, bias?, residual?)` with the attribute `activation`, one of gelu,
    gelu_tanh, quick_gelu, silu, or swiglu (output width halved: silu(gate) * up of `[gate, up]`).
    """

    def __init__(self, selected: Callable[[str], bool]) -> None:
        self.selected = selected

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Linear" or node.domain != DOMAIN:
                continue
            if self.selected(node.name or ""):
                activated = _fuse_swiglu(node) or _fuse_activation(node)
                modified |= _fuse_residual(node) or activated
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
            common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _uses(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _take_over(node: ir.Node, result: ir.Value, activation: str) -> bool:
    output = node.outputs[0]
    node.attributes["activation"] = ir.AttrString("activation", activation)
    describe(output, like=result)
    replace(result, output)
    return True


def _fuse_swiglu(node: ir.Node) -> bool:
    uses = _uses(node.outputs[0])
    if len({id(use) for use in uses}) not in (1, 2):
        return False
    parts = [output for use in uses for output in use.outputs]
    cuts = {id(part): last_axis_slice(part) for part in parts}
    for gate in parts:
        cut = cuts[id(gate)]
        if cut is None or cut.start != 0 or cut.step != 1:
            continue
        silu = _silu(gate)
        if silu is None or len(silu.uses()) != 1:
            continue
        product = _uses(silu)[0]
        if product.op_type != "Mul":
            continue
        up = product.inputs[1] if product.inputs[0] is silu else product.inputs[0]
        other = last_axis_slice(up)
        fits = (
            other is not None
            and other.source is node.outputs[0]
            and (other.start, other.stop, other.step) == (cut.stop, 2 * cut.stop, 1)
        )
        if fits and len(up.uses()) == 1 and cut.stop % SWIGLU_BLOCK == 0:  # type: ignore[union-attr]
            return _take_over(node, product.outputs[0], "swiglu")
    return False


def _silu(x: ir.Value) -> ir.Value | None:
    return _gated(x, x)


def _quick_gelu(x: ir.Value) -> ir.Value | None:
    for use in _uses(x):
        factors = [constant(each) for each in use.inputs if each is not x]
        factor = factors[0] if use.op_type == "Mul" and len(factors) == 1 else None
        if factor is not None and factor.size == 1 and np.isclose(factor.item(), 1.702):
            return _gated(x, use.outputs[0])
    return None


def _gated(x: ir.Value, inner: ir.Value) -> ir.Value | None:
    """`x * sigmoid(inner)` if x and inner serve nothing else."""
    sigmoid = next((use for use in _uses(inner) if use.op_type == "Sigmoid"), None)
    if sigmoid is None or len(x.uses()) != 2 or len(sigmoid.outputs[0].uses()) != 1:
        return None
    product = _uses(sigmoid.outputs[0])[0]
    if product.op_type != "Mul" or all(each is not x for each in product.inputs):
        return None
    return product.outputs[0]


def _fuse_activation(node: ir.Node) -> bool:
    output = node.outputs[0]
    uses = _uses(output)
    if len(uses) == 1 and uses[0].op_type == "Gelu":
        approximate = uses[0].attributes.get("approximate")
        tanh = approximate is not None and approximate.as_string() == "tanh"
        return _take_over(node, uses[0].outputs[0], "gelu_tanh" if tanh else "gelu")
    for name, match in (("silu", _silu), ("quick_gelu", _quick_gelu)):
        if (result := match(output)) is not None:
            return _take_over(node, result, name)
    return False


def _fuse_residual(node: ir.Node) -> bool:
    output = node.outputs[0]
    uses = _uses(output)
    if len(uses) != 1 or uses[0].op_type != "Add":
        return False
    add = uses[0]
    residual = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    if residual is None or residual is output or residual.is_initializer():
        return False
    if residual.shape is None or residual.shape != output.shape:
        return False
    node.resize_inputs(4)
    node.replace_input_with(3, residual)
    replace(add.outputs[0], output)
    return True
