"""The export's graph passes, each on a graph of a few nodes: what they rewrite, what they leave."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from glmcompile.export.cleanup import RemoveNoOps, StaticReshapes
from glmcompile.export.linear import CanonicalizeLinear
from glmcompile.export.packed_projection import SplitPackedProjection

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def given(name: str, shape: list[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def weight(name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = (
        ir.Shape(array.shape),
        ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    return value


def step(
    op_type: str, inputs: list[ir.Value], shape: list[int | str], **attributes: object
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes)
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), ir.TensorType(FLOAT)
    return node


def model_of(inputs: list[ir.Value], nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(
        inputs,
        nodes[-1].outputs,
        nodes=nodes,
        initializers=weights,
        opset_imports={"": 23},
        name="test",
    )
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def transposed_matmul(name: str, permutation: list[int]) -> tuple[list[ir.Node], ir.Value]:
    matrix = weight(name, np.ones((4, 4), np.float32))
    transpose = step("Transpose", [matrix], [4, 4], perm=permutation)
    x = given("x", ["rows", 4])
    return [transpose, step("MatMul", [x, transpose.outputs[0]], ["rows", 4])], matrix


def test_matmul_and_bias_become_one_linear() -> None:
    nodes, matrix = transposed_matmul("block.proj.weight", [1, 0])
    bias = weight("block.proj.bias", np.ones(4, np.float32))
    nodes.append(step("Add", [nodes[1].outputs[0], bias], ["rows", 4]))
    model = model_of([nodes[1].inputs[0]], nodes, [matrix, bias])
    assert CanonicalizeLinear()(model).modified
    [linear] = model.graph
    assert (linear.domain, linear.op_type, linear.name) == (
        "com.glmcompile",
        "Linear",
        "block.proj",
    )
    assert [value.name for value in linear.inputs] == ["x", "block.proj.weight", "block.proj.bias"]
    assert model.graph.outputs[0].name == "v2"


def test_bias_of_another_consumer_is_left_alone() -> None:
    nodes, matrix = transposed_matmul("proj.weight", [1, 0])
    bias = weight("bias", np.ones(4, np.float32))
    product = nodes[1].outputs[0]
    nodes.append(step("Add", [product, bias], ["rows", 4]))
    nodes.append(step("Mul", [product, nodes[2].outputs[0]], ["rows", 4]))
    model = model_of([nodes[1].inputs[0]], nodes, [matrix, bias])
    CanonicalizeLinear()(model)
    assert operators(model) == ["Linear", "Add", "Mul"]


def test_matmul_by_the_stored_layout_is_no_linear_layer() -> None:
    nodes, matrix = transposed_matmul("table.weight", [0, 1])
    model = model_of([nodes[1].inputs[0]], nodes, [matrix])
    assert not CanonicalizeLinear()(model).modified


def test_gemm_becomes_linear_unless_scaled() -> None:
    for alpha, expected in ((1.0, ["Linear"]), (0.5, ["Gemm"])):
        matrix = weight("lm_head.weight", np.ones((4, 4), np.float32))
        gemm = step("Gemm", [given("x", ["rows", 4]), matrix], ["rows", 4], transB=1, alpha=alpha)
        model = model_of([gemm.inputs[0]], [gemm], [matrix])
        CanonicalizeLinear()(model)
        assert operators(model) == expected


@pytest.mark.parametrize(
    ("output", "expected"), [([1, "rows", 8], [1, -1, 8]), (["rows", "other"], None)]
)
def test_reshape_target_becomes_constant_with_one_dynamic_size(
    output: list[int | str], expected: list[int] | None
) -> None:
    x = given("x", ["rows", 8])
    shape = step("Shape", [x], [2])
    reshape = step("Reshape", [x, shape.outputs[0]], output)
    StaticReshapes()(model_of([x], [shape, reshape], []))
    target = reshape.inputs[1]
    assert target is not None
    found = None if target.const_value is None else target.const_value.numpy().tolist()
    assert found == expected


def test_undone_rearrangements_go() -> None:
    x = given("x", ["a", 3, 4])
    first = step("Transpose", [x], [3, "a", 4], perm=[1, 0, 2])
    second = step("Transpose", [first.outputs[0]], ["a", 3, 4], perm=[1, 0, 2])
    model = model_of([x], [first, second, step("Neg", [second.outputs[0]], ["a", 3, 4])], [])
    assert RemoveNoOps()(model).modified
    assert model.graph.outputs[0].producer().inputs[0] is x


def test_rearrangements_that_are_not_undone_stay() -> None:
    x = given("x", ["a", 3, 4])
    first = step("Transpose", [x], [3, 4, "a"], perm=[1, 2, 0])
    second = step("Transpose", [first.outputs[0]], [4, "a", 3], perm=[1, 2, 0])
    model = model_of([x], [first, second, step("Neg", [second.outputs[0]], [4, "a", 3])], [])
    assert not RemoveNoOps()(model).modified


def test_packed_projection_is_split_without_transpose() -> None:
    x = given("x", ["tokens", 24])
    constants = {
        name: weight(name, np.array(values))
        for name, values in {
            "shape": [-1, 3, 2, 4],
            "axis": [0],
            **{str(bound): [bound] for bound in range(4)},
        }.items()
    }
    reshape = step("Reshape", [x, constants["shape"]], ["tokens", 3, 2, 4])
    transpose = step("Transpose", [reshape.outputs[0]], [3, "tokens", 2, 4], perm=[1, 0, 2, 3])
    nodes, parts = [reshape, transpose], []
    for index in range(3):
        bounds = [constants[str(index)], constants[str(index + 1)], constants["axis"]]
        cut = step("Slice", [transpose.outputs[0], *bounds], [1, "tokens", 2, 4])
        squeeze = step("Squeeze", [cut.outputs[0], constants["axis"]], ["tokens", 2, 4])
        nodes += [cut, squeeze]
        parts.append(squeeze.outputs[0])
    nodes.append(step("Concat", parts, ["tokens", 2, 12], axis=-1))
    model = model_of([x], nodes, list(constants.values()))
    array = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    expected = run(model.clone(), x=array)
    assert SplitPackedProjection()(model).modified
    np.testing.assert_array_equal(run(model, x=array), expected)
