"""Feeds attention from the merged q/k/v projection as it is, with one node in between."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, integer, last_axis_slice, through

SAME = ("interleaved", "rotary_embedding_dim")


class PackAttention(ir.passes.InPlacePass):
    """Requires PagedAttention or VarlenAttention (query, key, value, ...) where all three are parts
    of one linear layer's output, queries and keys rotated by the same RotaryEmbedding tables, and
    values as wide as keys.

    Ensures com.glmcompile::PackedRotary in between: with one output where the operator takes
    query, key and value packed (PagedAttention), with three elsewhere.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        packed = 0
        for node in list(model.graph):
            if node.op_type in ("PagedAttention", "VarlenAttention") and node.inputs[1] is not None:
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
    if any(integer(rotary_q, each, 0) != integer(rotary_k, each, 0) for each in SAME):
        return False
    if list(rotary_q.inputs[1:3]) != list(rotary_k.inputs[1:3]):
        return False
    source, ends = None, [0]
    for part in (rotary_q.inputs[0], rotary_k.inputs[0], value):
        cut = last_axis_slice(through(part, "Reshape")) if part is not None else None
        if cut is None or cut.start != ends[-1] or source not in (None, cut.source):
            return False
        source = cut.source
        ends.append(cut.stop)
    if ends[3] - ends[2] != ends[2] - ends[1]:
        return False
    heads, kv_heads = integer(attention, "num_heads", 0), integer(attention, "kv_num_heads", 0)
    one_output = attention.op_type == "PagedAttention"
    rotary = ir.node(
        "PackedRotary",
        [source, *rotary_q.inputs[1:3]],
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "head_size": ends[1] // heads,
            **{name: integer(rotary_q, name, 0) for name in SAME},
        },
        domain=DOMAIN,
        num_outputs=1 if one_output else 3,
    )
    graph.append(rotary)
    for index in range(3):
        output = rotary.outputs[index] if index < len(rotary.outputs) else None
        if output is not None:
            width = ends[-1] if one_output else ends[index + 1] - ends[index]
            output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([None, width])
        attention.replace_input_with(index, output)
    return True
