"""Merges a module's linear layers that read one input (q/k/v, gate/up) and splits their output.

One wide product reads and quantizes its input once and fills the matrix unit better than several
narrow ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import DOMAIN, describe, dimensions, lazy_initializer, replace


class MergeLinears(ir.passes.InPlacePass):
    """Requires `com.glmcompile::Linear` nodes with named weights `[out_features, in_features]`.

    Ensures that no two of one module share an input: attention and MLP beside each other stay
    apart. The merged weight is read lazily from its parts.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        siblings: dict[tuple[ir.Value, str, bool], list[ir.Node]] = {}
        for node in model.graph:
            if node.op_type == "Linear" and node.domain == DOMAIN and node.inputs[0] is not None:
                module = (node.name or "").rpartition(".")[0]
                key = node.inputs[0], module, len(node.inputs) > 2
                siblings.setdefault(key, []).append(node)
        groups = [nodes for nodes in siblings.values() if len(nodes) > 1]
        for nodes in groups:
            _merge(model.graph, nodes)
        if groups:
            common_passes.RemoveUnusedNodesPass()(model)
            common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=bool(groups))


def merged_name(names: list[str]) -> str:
    """`layer.q_proj`, `layer.k_proj` -> `layer.q_proj+k_proj`."""
    parents = {name.rpartition(".")[0] + "." for name in names}
    parent = parents.pop() if len(parents) == 1 else ""
    return parent + "+".join(name.removeprefix(parent) for name in names)


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    biases = [node.inputs[2] for node in nodes if len(node.inputs) > 2]
    sizes = [dimensions(weight)[0] for weight in weights]
    name = merged_name([node.name or "" for node in nodes])
    inputs = [nodes[0].inputs[0], _concatenate(graph, weights, f"{name}.weight")]
    if biases:
        inputs.append(_concatenate(graph, biases, f"{name}.bias"))
    tape = ir.tape.Tape(graph)
    merged = tape.op("Linear", inputs, domain=DOMAIN, name=name)
    first = nodes[0].outputs[0]
    describe(merged, like=first)
    if first.shape is not None:
        merged.shape = ir.Shape([*first.shape[:-1], sum(sizes)])
    lengths = tape.op("Constant", [], attributes={"value_ints": sizes})
    split = ir.Node(
        "",
        "Split",
        [merged, lengths],
        attributes=[ir.AttrInt64("axis", -1)],
        num_outputs=len(nodes),
        graph=graph,
    )
    for node, output in zip(nodes, split.outputs, strict=True):
        describe(output, like=node.outputs[0])
        replace(node.outputs[0], output)


def _concatenate(graph: ir.Graph, parts: Sequence[ir.Value | None], name: str) -> ir.Value:
    """An initializer that joins `parts` along the first axis when it is read."""
    values = [part for part in parts if part is not None]
    tensors = [value.const_value for value in values if value.const_value is not None]
    assert len(tensors) == len(parts)
    shapes = [dimensions(value) for value in values]
    shape = [sum(each[0] for each in shapes), *shapes[0][1:]]
    return lazy_initializer(
        graph,
        name,
        tensors[0].dtype,
        shape,
        lambda: np.concatenate([tensor.numpy() for tensor in tensors]),
    )
