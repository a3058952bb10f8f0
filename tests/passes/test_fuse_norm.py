"""FuseNorm: the same result from fewer nodes, where nothing else reads the normalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from glmcompile.native import library_path
from glmcompile.passes.fuse_norm import FuseNorm
from glmcompile.quantize.packing import pack_weight, weight_sum

TOKENS, K, N = 9, 96, 48


def graph(smoothed: bool, selected: bool, shared: bool = False, axis: int = -1) -> ir.Model:
    """x [1, TOKENS, K] -> RMSNormalization -> (two rows of it) -> LinearW8A8 -> y."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (N, K), dtype=np.int8)
    constants = {
        "norm": rng.uniform(0.5, 2, K if axis == -1 else (TOKENS, K)),
        "scale": np.full(N, 0.01),
        "factor": rng.uniform(0.5, 2, K),
    }
    arrays = {name: value.astype(np.float32) for name, value in constants.items()}
    arrays |= {"weight": pack_weight(weight), "sum": weight_sum(weight)}
    arrays |= {"axes": np.array([0]), "rows": np.array([7, 2])}
    nodes = [helper.make_node("RMSNormalization", ["x", "norm"], ["n"], axis=axis, epsilon=1e-6)]
    if selected:
        nodes.append(helper.make_node("Squeeze", ["n", "axes"], ["s"]))
        nodes.append(helper.make_node("Gather", ["s", "rows"], ["g"], axis=0))
    inputs = ["g" if selected else "n", "weight", "scale", "sum", *["", "", "factor"] * smoothed]
    nodes.append(
        helper.make_node(
            "LinearW8A8", inputs, ["y"], domain="com.glmcompile", in_features=K, out_features=N
        )
    )
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if shared:
        nodes.append(helper.make_node("Neg", ["n"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    shapes = {"n": [1, TOKENS, K], "s": [TOKENS, K], "g": [2, K]}
    model = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TOKENS, K])],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.glmcompile", 1)]
    return ir.serde.deserialize_model(helper.make_model(model, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("selected", [False, True])
def test_the_layer_takes_the_normalization_over(smoothed: bool, selected: bool) -> None:
    x = np.random.default_rng(1).normal(size=(1, TOKENS, K)).astype(np.float32)
    before = graph(smoothed, selected)
    expected = run(before, x)
    after = graph(smoothed, selected)
    assert FuseNorm()(after).modified
    ir.passes.common.RemoveUnusedNodesPass()(after)
    assert operators(after) == [name for name in operators(before) if name != "RMSNormalization"]
    # A few of the rounded inputs may fall to the other side: one step of 1 / 50 times a weight.
    assert np.abs(run(after, x) - expected).max() < 0.01 * 127 * 3 / 50
    assert np.abs(expected).max() > 10


def test_a_normalization_that_others_read_stays() -> None:
    model = graph(smoothed=True, selected=False, shared=True)
    assert not FuseNorm()(model).modified
    assert operators(model) == ["RMSNormalization", "LinearW8A8", "Neg"]


def test_a_normalization_over_more_than_the_last_axis_stays() -> None:
    assert not FuseNorm()(graph(smoothed=False, selected=False, axis=-2)).modified
