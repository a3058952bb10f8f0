"""Every linear layer as one node: com.glmcompile::Linear(x, weight [out, in], bias?)."""

from __future__ import annotations

import onnx_ir as ir

from glmcompile.passes.matching import DOMAIN

LINEAR = "Linear"


class CanonicalizeLinear(ir.passes.InPlacePass):
    """Rewrite MatMul(x, Transpose(weight)) [+ Add bias] and Gemm(x, weight, bias, transB=1).

    Requires: weights are initializers of rank 2 named `<module>.weight`, [out, in] as torch stores
    them. Ensures: each becomes a Linear node named `<module>` that reads the initializer itself, so
    quantization and lowering find weights and names without matching patterns.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "MatMul" and node.domain == "":
                modified |= _from_matmul(model.graph, node)
            elif node.op_type == "Gemm" and node.domain == "":
                modified |= _from_gemm(model.graph, node)
        if modified:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def linear_node(
    x: ir.Value, weight: ir.Value, bias: ir.Value | None, like: ir.Value, name: str
) -> ir.Node:
    """A Linear node whose output has the name, type and shape of `like`."""
    node = ir.node(
        LINEAR, [x, weight] + ([bias] if bias is not None else []), domain=DOMAIN, name=name
    )
    output = node.outputs[0]
    output.name, output.type, output.shape = like.name, like.type, like.shape
    return node


def module_name(weight: ir.Value) -> str:
    """The path of the module that owns a parameter."""
    assert weight.name is not None
    return weight.name.rpartition(".")[0]


def _from_matmul(graph: ir.Graph, matmul: ir.Node) -> bool:
    x, transposed = matmul.inputs
    transpose = transposed.producer() if transposed is not None else None
    if x is None or transpose is None or transpose.op_type != "Transpose":
        return False
    weight = transpose.inputs[0]
    permutation = transpose.attributes.get_ints("perm", [1, 0])
    if weight is None or not _is_matrix(weight) or list(permutation) != [1, 0]:
        return False
    bias, last = _added_bias(matmul)
    name = module_name(weight)
    replace_node(graph, last, linear_node(x, weight, bias, last.outputs[0], name))
    if last is not matmul:
        graph.remove(matmul, safe=True)
    if not transpose.outputs[0].uses():
        graph.remove(transpose, safe=True)
    return True


def _from_gemm(graph: ir.Graph, gemm: ir.Node) -> bool:
    x, weight, *rest = gemm.inputs
    attributes = gemm.attributes
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    layout = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    if x is None or weight is None or not _is_matrix(weight) or not plain or layout != (0, 1):
        return False
    bias = rest[0] if rest else None
    name = module_name(weight)
    replace_node(graph, gemm, linear_node(x, weight, bias, gemm.outputs[0], name))
    return True


def _added_bias(matmul: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The bias initializer added to a MatMul's output, and the last node of the pair."""
    output = matmul.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        add = uses[0].node
        other = add.inputs[1 - uses[0].idx]
        if other is not None and other.is_initializer() and len(other.shape or ()) == 1:
            return other, add
    return None, matmul


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 2


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, taking over its uses and its place among the outputs."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)
