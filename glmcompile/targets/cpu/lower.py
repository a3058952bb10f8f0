"""Lowers simplified graphs to operators that ONNX Runtime's CPU provider and the library run."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, describe, replace
from glmcompile.passes.pack_attention import PackAttention

MICROSOFT = "com.microsoft"


def lower(model: ir.Model) -> None:
    """Leave no `com.glmcompile::Linear` in the graph; what quantization made stays as it is."""
    ir.passes.Sequential(PackAttention(), LowerLinear())(model)
    model.opset_imports[MICROSOFT] = 1
    model.opset_imports[DOMAIN] = 1
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.NameFixPass()(model)
    common_passes.TopologicalSortPass()(model)


class LowerLinear(ir.passes.InPlacePass):
    """Float32 layers become FusedMatMul with a transposed weight, so that the weight stays
    `[out, in]` as stored and can be shared with the embedding, and an Add for the bias.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tape = ir.tape.Tape(model.graph)
        nodes = [n for n in model.graph if n.op_type == "Linear" and n.domain == DOMAIN]
        for node in nodes:
            x, weight, bias = [*node.inputs, None][:3]
            old = node.outputs[0]
            output = tape.op(
                "FusedMatMul",
                [x, weight],
                domain=MICROSOFT,
                name=node.name,
                attributes={"transB": 1},
            )
            if bias is not None:
                output = tape.op("Add", [output, bias])
            describe(output, like=old)
            replace(old, output)
        return ir.passes.PassResult(model, modified=bool(nodes))
