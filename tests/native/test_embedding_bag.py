"""EmbeddingBag against torch's embedding_bag: weighted sums of rows, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from glmcompile.native import library_path

TYPES = {"table": TensorProto.FLOAT, "indices": TensorProto.INT64, "weights": TensorProto.FLOAT}


def run(**inputs: NDArray) -> NDArray[np.float32]:
    graph = helper.make_graph(
        [helper.make_node("EmbeddingBag", list(TYPES), ["y"], domain="com.glmcompile")],
        "bag",
        [
            helper.make_tensor_value_info(name, kind, [None] * inputs[name].ndim)
            for name, kind in TYPES.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.glmcompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)[0]


@pytest.mark.parametrize("width", [1, 31, 32, 100])
@pytest.mark.parametrize(("bags", "size"), [(0, 4), (1, 1), (3, 5), (600, 16)])
def test_bags_equal_torch(bags: int, size: int, width: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, width)).astype(np.float32)
    indices = rng.integers(0, 9, (bags, size))
    weights = rng.standard_normal((bags, size)).astype(np.float32)
    expected = torch.nn.functional.embedding_bag(
        torch.from_numpy(indices),
        torch.from_numpy(table).double(),
        per_sample_weights=torch.from_numpy(weights).double(),
        mode="sum",
    )
    actual = run(table=table, indices=indices, weights=weights)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 9])
def test_indices_outside_the_table_are_refused(bad: int) -> None:
    table, weights = np.zeros((9, 4), np.float32), np.zeros((1, 3), np.float32)
    with pytest.raises(InvalidArgument, match=f"indices: expected 0 to 8, got {bad} at position 2"):
        run(table=table, indices=np.array([[0, 8, bad]]), weights=weights)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9,), (1, 3), (1, 3)), r"table: expected \[rows, width\], got \[9\]"),
        (((9, 4), (3,), (1, 3)), r"indices: expected \[bags, size\], got \[3\]"),
        (((9, 4), (1, 3), (1, 2)), r"weights: expected \[1, 3\] as indices, got \[1, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    table, indices, weights = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(InvalidArgument, match=message):
        run(table=table, indices=indices.astype(np.int64), weights=weights)
