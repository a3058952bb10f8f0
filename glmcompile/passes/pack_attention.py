"""Feeds attention from the merged q/k/v projection as it is, with one node in between."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, integer, last_axis_slice, through


class PackAttention(ir.passes.InPlacePass):
    """Requires PagedAttention(query, key, value) where all three are parts of one linear layer's
    output, queries and keys rotated by the same RotaryEmbedding tables.

    Ensures PagedAttention(packed), the operator's packed form, behind com.glmcompile::PackedRotary.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        packed = 0
        for node in list(model.graph):
            if node.op_type == "PagedAttention" and node.inputs[1] is not None:
                packed += _pack(model.graph, node)
        if packed:
            common_passes.RemoveUnusedNodesPass()(model)
            common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=bool(packed))


def _rotary(value: ir.Value | None) -> ir.Node | None:
    node = through(value, "Reshape").producer() if value is not None else None
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _pack(graph: ir.Graph, attention: ir.Node) -> bool:
    query, key, value = attention.inputs[:3]
    rotary_q, rotary_k = _rotary(query), _rotary(key)
    if rotary_q is None or rotary_k is None or value is None:
        return False
    same = ("interleaved", "rotary_embedding_dim")
    if any(integer(rotary_q, each, 0) != integer(rotary_k, each, 0) for each in same):
        return False
    if list(rotary_q.inputs[1:3]) != list(rotary_k.inputs[1:3]):
        return False
    sources = [rotary_q.inputs[0], rotary_k.inputs[0], value]
    cuts = [last_axis_slice(through(each, "Reshape")) for each in sources if each is not None]
    ends = [0]
    for cut in cuts:
        if cut is None or cut.source is not cuts[0].source or cut.start != ends[-1]:  # type: ignore[union-attr]
            return False
        ends.append(cut.stop)
    heads, kv_heads = integer(attention, "num_heads", 0), integer(attention, "kv_num_heads", 0)
    head_size = ends[1] // heads
    tape = ir.tape.Tape(graph)
    packed = tape.op(
        "PackedRotary",
        [cuts[0].source, *rotary_q.inputs[1:3]],  # type: ignore[union-attr]
        domain=DOMAIN,
        attributes={
            "num_heads": heads + kv_heads,
            "head_size": head_size,
            **{name: integer(rotary_q, name, 0) for name in same},
        },
    )
    packed.dtype, packed.shape = ir.DataType.FLOAT, ir.Shape([None, ends[-1]])
    attention.replace_input_with(0, packed)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    return True
