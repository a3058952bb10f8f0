"""SelectRows: the same rows of a result, and none of the work for the others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from glmcompile.passes.select_rows import SelectRows

K = 8
ROWS = np.array([4, 1])


def graph(kept: str = "") -> ir.Model:
    """x [1, tokens, K] -> a token's predecessors summed -> norm, gate, residual -> ROWS of it.

    kept: a value inside that is an output of the graph as well.
    """
    rng = np.random.default_rng(0)
    weights = {
        "norm": rng.uniform(0.5, 2, K).astype(np.float32),
        "two": np.float32(2),
        "axis": np.array(1),
        "axes": np.array([0]),
    }
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["mixed"]),
        helper.make_node("RMSNormalization", ["mixed", "norm"], ["normal"], axis=-1),
        helper.make_node("Split", ["normal"], ["left", "right"], axis=-1, num_outputs=2),
        helper.make_node("Sigmoid", ["left"], ["gate"]),
        helper.make_node("Mul", ["gate", "right"], ["gated"]),
        helper.make_node("Mul", ["gated", "two"], ["doubled"]),
        helper.make_node("Split", ["mixed"], ["first", "second"], axis=-1, num_outputs=2),
        helper.make_node("Add", ["doubled", "first"], ["sum"]),
        helper.make_node("Squeeze", ["sum", "axes"], ["flat"]),
        helper.make_node("Gather", ["flat", "rows"], ["y"], axis=0),
    ]
    whole = {"mixed", "normal"}
    shapes = {
        name: [1, "tokens", K if name in whole else K // 2]
        for node in nodes[:8]
        for name in node.output
    }
    shapes |= {"flat": ["tokens", K // 2]}

    def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    model = helper.make_graph(
        nodes,
        "rows",
        [value("x", [1, "tokens", K]), value("rows", ["rows"], TensorProto.INT64)],
        [value("y", ["rows", K // 2]), *([value(kept, shapes[kept])] if kept else [])],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in weights.items()],
        value_info=[value(name, shape) for name, shape in shapes.items() if name != kept],
    )
    opsets = [helper.make_opsetid("", 23)]
    return ir.serde.deserialize_model(helper.make_model(model, opset_imports=opsets, ir_version=10))


def run(model: ir.Model) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(1).normal(size=(1, 6, K)).astype(np.float32)
    return session.run(None, {"x": x, "rows": ROWS})  # type: ignore[no-any-return]


def tokens(model: ir.Model) -> dict[str, object]:
    """By operator, how many tokens its result is declared to have."""
    return {node.op_type: str(node.outputs[0].shape[1]) for node in model.graph if rank(node) == 3}


def rank(node: ir.Node) -> int:
    return len(node.outputs[0].shape or ())


@pytest.mark.parametrize("kept", ["", "doubled", "gate", "mixed"])
def test_results_stay(kept: str) -> None:
    model = graph(kept)
    expected = run(model)
    SelectRows()(model)
    for found, before in zip(run(model), expected, strict=True):
        np.testing.assert_array_equal(found, before)


def test_nodes_behind_the_last_that_mixes_tokens_see_the_rows_alone() -> None:
    model = graph()
    SelectRows()(model)
    found = tokens(model)
    assert found.pop("CumSum") == "tokens"
    assert set(found.values()) == {"rows"}


def test_a_value_read_elsewhere_keeps_all_tokens() -> None:
    model = graph("doubled")
    SelectRows()(model)
    assert tokens(model)["Mul"] == "tokens"
    assert tokens(model)["Add"] == "rows"
