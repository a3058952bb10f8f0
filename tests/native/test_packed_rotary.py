"""PackedRotary against NumPy: both kinds of rotation, partial heads, one output or three."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from glmcompile.native import library_path

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 16, 7
WIDTH = (HEADS + 2 * KV_HEADS) * SIZE
RTOL, ATOL = 1e-6, 1e-6


def run(
    outputs: int, x: NDArray, cos: NDArray, sin: NDArray, **attributes: int
) -> list[NDArray[np.float32]]:
    names = ["query", "key", "value"][:outputs]
    sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_size": SIZE}
    node = helper.make_node(
        "PackedRotary", ["x", "cos", "sin"], names, domain="com.glmcompile", **(sizes | attributes)
    )
    graph = helper.make_graph(
        [node],
        "rotary",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * array.ndim)
            for name, array in (("x", x), ("cos", cos), ("sin", sin))
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.glmcompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x, "cos": cos, "sin": sin})


def rotated(heads: NDArray, cos: NDArray, sin: NDArray, interleaved: bool) -> NDArray:
    """`[tokens, heads, size]` rotated in float64 in its first 2 * half channels."""
    half = cos.shape[-1]
    result = heads.astype(np.float64)
    turning = result[..., : 2 * half]
    pairs = (
        (turning[..., 0::2], turning[..., 1::2])
        if interleaved
        else (turning[..., :half], turning[..., half:])
    )
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    first, second = pairs[0] * c - pairs[1] * s, pairs[1] * c + pairs[0] * s
    joined = np.stack([first, second], -1) if interleaved else np.stack([first, second], -2)
    result[..., : 2 * half] = joined.reshape(turning.shape)
    return result


def expected(x: NDArray, cos: NDArray, sin: NDArray, interleaved: bool) -> list[NDArray]:
    heads = x.reshape(TOKENS, -1, SIZE)
    parts = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    turned = [rotated(part, cos, sin, interleaved) for part in parts[:2]]
    return [part.reshape(TOKENS, -1) for part in (*turned, parts[2])]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [SIZE, SIZE // 2])
def test_queries_and_keys_turn_and_values_pass(interleaved: bool, dim: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    cos, sin = rng.normal(size=(2, TOKENS, dim // 2)).astype(np.float32)
    attributes = {"interleaved": int(interleaved), "rotary_embedding_dim": dim}
    wanted = expected(x, cos, sin, interleaved)
    for got, want in zip(run(3, x, cos, sin, **attributes), wanted, strict=True):
        np.testing.assert_allclose(got, want, RTOL, ATOL)
    [packed] = run(1, x, cos, sin, **attributes)
    np.testing.assert_allclose(packed, np.concatenate(wanted, axis=1), RTOL, ATOL)


def test_no_tokens_give_no_rows() -> None:
    empty = np.zeros((0, WIDTH), np.float32)
    table = np.zeros((0, SIZE // 2), np.float32)
    assert [each.shape for each in run(3, empty, table, table)] == [
        (0, HEADS * SIZE),
        (0, KV_HEADS * SIZE),
        (0, KV_HEADS * SIZE),
    ]


@pytest.mark.parametrize(
    ("x", "table", "attributes", "message"),
    [
        ((TOKENS, WIDTH - 1), (TOKENS, 8), {}, "x: expected"),
        ((TOKENS, WIDTH), (TOKENS + 1, 8), {}, "cos: expected"),
        ((TOKENS, WIDTH), (TOKENS, 7), {}, "cos: expected"),
        ((TOKENS, WIDTH), (TOKENS, 8), {"rotary_embedding_dim": 18}, "rotary_embedding_dim"),
        ((TOKENS, WIDTH), (TOKENS, 8), {"num_heads": 0}, "num_heads"),
    ],
)
def test_what_does_not_fit_is_named(
    x: tuple[int, int], table: tuple[int, int], attributes: dict[str, int], message: str
) -> None:
    zeros = np.zeros(table, np.float32)
    with pytest.raises(Exception, match=message):
        run(1, np.zeros(x, np.float32), zeros, zeros, **attributes)
