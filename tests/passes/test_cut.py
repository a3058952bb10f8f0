"""Graphs cut into layers: every node once, and the parts together compute the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from glmcompile.checkpoint import Checkpoint
from glmcompile.passes import simplify
from glmcompile.passes.cut import Segment, cut, last_uses

LAYERS = ("layers.0", "layers.1")


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def parameter(name: str) -> ir.Value:
    array = np.full(4, 2.0 + len(name), np.float32)
    made = value(name, 4)
    made.const_value = ir.tensor(array, name=name)
    return made


def node(operator: str, name: str, *inputs: ir.Value) -> ir.Node:
    made = ir.node(operator, list(inputs))
    made.outputs[0].name = name
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return made


def residual_model() -> ir.Model:
    """embed -> two layers `h + h * w` that share a table -> norm -> head."""
    x = value("x", "n", 4)
    weights = [
        parameter(name) for name in ("embed.w", "layers.0.w", "layers.1.w", "norm.w", "head.w")
    ]
    table = node("Sin", "table", x)
    nodes = [table, node("Mul", "h0", x, weights[0])]
    for layer in (0, 1):
        inner = node("Mul", f"inner{layer}", nodes[-1].outputs[0], weights[1 + layer])
        turned = node("Add", f"turned{layer}", inner.outputs[0], table.outputs[0])
        after = node("Add", f"h{layer + 1}", nodes[-1].outputs[0], turned.outputs[0])
        nodes += [inner, turned, after]
    nodes.append(node("Mul", "normed", nodes[-1].outputs[0], weights[3]))
    nodes.append(node("Mul", "y", nodes[-1].outputs[0], weights[4]))
    graph = ir.Graph(
        [x],
        [nodes[-1].outputs[0]],
        nodes=nodes,
        initializers=weights,
        opset_imports={"": 23},
        name="model",
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_a_layer_takes_what_its_parameters_work_on() -> None:
    segments = cut(residual_model(), LAYERS)
    assert [each.name for each in segments] == ["begin", "layers.0", "layers.1", "end"]
    assert [set(each.inputs) for each in segments] == [
        {"x"},
        {"h0", "table"},
        {"h1", "table"},
        {"h2"},
    ]
    assert [set(each.outputs) for each in segments] == [{"h0", "table"}, {"h1"}, {"h2"}, {"y"}]
    assert last_uses(segments) == {"x": 0, "h0": 1, "table": 2, "h1": 2, "h2": 3}


def test_the_parts_compute_what_the_whole_computes() -> None:
    model = residual_model()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    known = {"x": x}
    for segment in cut(model, LAYERS):
        known |= run(segment.model, {name: known[name] for name in segment.inputs})
    np.testing.assert_array_equal(known["y"], run(model, {"x": x})["y"])


def test_what_serves_the_next_layer_alone_goes_there() -> None:
    """A square of the residual stream costs less to compute again than to keep on disk."""
    model = residual_model()
    graph = model.graph
    h1 = next(each.outputs[0] for each in graph if each.outputs[0].name == "h1")
    inner1 = next(each for each in graph if each.outputs[0].name == "inner1")
    square = node("Mul", "square", h1, h1)
    graph.insert_before(inner1, square)
    inner1.replace_input_with(0, square.outputs[0])
    segments = {each.name: each for each in cut(model, LAYERS)}
    assert segments["layers.0"].outputs == ("h1",)
    assert any(each.outputs[0].name == "square" for each in segments["layers.1"].model.graph)


def test_names_that_begin_alike_are_different_layers() -> None:
    model = residual_model()
    model.graph.initializers["layers.1.w"].name = "layers.10.w"
    names = [each.name for each in cut(model, ("layers.0", "layers.1", "layers.10"))]
    assert names == ["begin", "layers.0", "layers.10", "end"]


def test_real_components_are_cut_at_their_layers(
    exported: Callable[[str], dict[str, ir.Model]],
    checkpoint_of: Callable[[str], Checkpoint],
    family_name: str,
) -> None:
    checkpoint = checkpoint_of(family_name)
    for component, model in exported(family_name).items():
        model = model.clone()
        simplify(model)
        layers = checkpoint.structure.layers[component]
        assert len(layers) == 2
        segments = cut(model, layers)
        assert [each.name for each in segments] == ["begin", *layers, "end"]
        assert sum(count(each) for each in segments) == len(list(model.graph))
        for segment in segments[1:-1]:
            hidden = [name for name in segment.outputs if "cache" not in name]
            assert len(hidden) == 1, (component, segment.name, segment.outputs)


def count(segment: Segment) -> int:
    return len(list(segment.model.graph))
