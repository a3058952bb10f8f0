"""Exact references of LinearW8A8 and EmbeddingW8, and sessions of one node to compare them with."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from glmcompile.native import library_path
from glmcompile.quantize.packing import pack_weight, weight_sum

# Values of GLMCOMPILE_ISA; one the processor lacks selects the best kernel below it.
ISAS = ("portable", "avx2", "avx_vnni", "avx512", "amx_emulated", "amx")
INPUTS = ("x", "ids", "weight", "weight_scale", "weight_sum")
OPTIONAL = ("bias", "residual", "input_scale")
ACTIVATIONS = ("", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")

# Relative to the largest magnitude entering a sum: float32 rounding of the epilogue, and the
# error of its exp and erf approximations.
EPILOGUE_RTOL = 1e-6
# Of an activation, relative to the magnitude of its argument.
ACTIVATION_RTOL = 3e-7

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}


def one_node_session(
    op: str,
    inputs: Mapping[str, NDArray],
    constants: Mapping[str, NDArray],
    attributes: Mapping[str, Any],
    isa: str = "",
    threads: int = 2,
    order: Sequence[str] = INPUTS,
    optional: Sequence[str] = OPTIONAL,
) -> ort.InferenceSession:
    """A session of one com.glmcompile node; inputs in neither mapping are absent.

    order, optional: the operator's inputs, first the required ones, of which those that are not
        given leave no gap.
    """
    given = {**inputs, **constants}
    names = [name for name in order if name in given]
    names += [name if name in given else "" for name in optional]
    while names and not names[-1]:
        names.pop()
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain="com.glmcompile", **attributes)],
        op,
        [
            helper.make_tensor_value_info(n, _TYPES[v.dtype], [None] * v.ndim)
            for n, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.glmcompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    before = os.environ.get("GLMCOMPILE_ISA")
    os.environ["GLMCOMPILE_ISA"] = isa
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    finally:
        if before is None:
            del os.environ["GLMCOMPILE_ISA"]
        else:
            os.environ["GLMCOMPILE_ISA"] = before


@dataclass
class Linear:
    """A linear layer: int8 weight [N, K], its scale [N], optional bias [N], input scale [K]."""

    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    activation: str = ""
    static: tuple[float, int] | None = None
    input_scale: NDArray[np.float32] | None = None
    rms_epsilon: float = 0.0

    @property
    def width(self) -> int:
        return self.weight.shape[0] // (2 if self.activation == "swiglu" else 1)

    def constants(self) -> dict[str, NDArray]:
        arrays: dict[str, NDArray] = {
            "weight": pack_weight(self.weight),
            "weight_scale": self.scale,
            "weight_sum": weight_sum(self.weight),
        }
        optional = {"bias": self.bias, "input_scale": self.input_scale}
        return arrays | {name: value for name, value in optional.items() if value is not None}

    def attributes(self) -> dict[str, Any]:
        n, k = self.weight.shape
        values: dict[str, Any] = {"in_features": k, "out_features": n}
        if self.activation:
            values["activation"] = self.activation
        if self.static:
            values["activation_scale"] = self.static[0]
            values["activation_zero_point"] = float(self.static[1])
        if self.rms_epsilon:
            values["rms_epsilon"] = self.rms_epsilon
        return values

    def session(
        self, x: NDArray, residual: NDArray | None = None, isa: str = "", threads: int = 2
    ) -> ort.InferenceSession:
        inputs = {"x": x} if residual is None else {"x": x, "residual": residual}
        return one_node_session(
            "LinearW8A8", inputs, self.constants(), self.attributes(), isa, threads
        )

    def run(
        self, x: NDArray, residual: NDArray | None = None, isa: str = "", threads: int = 2
    ) -> NDArray[np.float32]:
        feed = {"x": x} if residual is None else {"x": x, "residual": residual}
        return self.session(x, residual, isa, threads).run(None, feed)[0]


def quantize(
    x: NDArray[np.float32], static: tuple[float, int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Finite rows [M, K] to (q, scale [M, 1], zero_point [M, 1]), in the operator's arithmetic."""
    low = np.minimum(x.min(axis=1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(axis=1, keepdims=True), np.float32(0))
    scale = (high - low) / np.float32(255)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    if static:
        scale = np.full_like(scale, static[0])
    inverse = np.float32(1) / scale
    zero_point = np.minimum(np.rint(-low * inverse), np.float32(255))
    zero_point = np.where(high - low == 0, np.float32(0), zero_point)
    if static:
        zero_point = np.full_like(zero_point, static[1])
    q = np.clip(np.rint(x * inverse) + zero_point, 0, 255)
    return q.astype(np.int64), scale, zero_point.astype(np.int64)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(y: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    """The activation in float64; swiglu halves the last dimension."""
    if activation == "gelu":
        return 0.5 * y * (1 + _erf(y / np.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    if activation == "quick_gelu":
        return y * _sigmoid(1.702 * y)
    if activation == "silu":
        return y * _sigmoid(y)
    if activation == "swiglu":
        blocks = y.reshape(*y.shape[:-1], -1, 2, 16)
        gate, up = blocks[..., 0, :], blocks[..., 1, :]
        return (gate * _sigmoid(gate) * up).reshape(*y.shape[:-1], -1)
    return y


def reference(
    layer: Linear, x: NDArray[np.float32], residual: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Result [M, width] in float64 from exact integer sums, and the absolute tolerance for it."""
    rows = x.reshape(-1, layer.weight.shape[1])
    squares = np.mean(rows.astype(np.float64) ** 2, axis=1, keepdims=True)
    norm = 1 / np.sqrt(squares + layer.rms_epsilon) if layer.rms_epsilon else 1.0
    if layer.input_scale is not None:
        rows = rows * layer.input_scale
    bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    if len(rows) == 0:
        empty = np.zeros((*x.shape[:-1], layer.width))
        return empty, empty
    q, scale, zero_point = quantize(rows, layer.static)
    acc = (q - zero_point) @ layer.weight.astype(np.int64).T
    product = acc * (norm * scale.astype(np.float64) * layer.scale.astype(np.float64))
    y = activate(product + bias, layer.activation)
    magnitude = np.abs(product) + np.abs(bias) + 1
    if layer.activation == "swiglu":
        blocks = magnitude.reshape(len(rows), -1, 2, 16)
        magnitude = (blocks[:, :, 0] * blocks[:, :, 1]).reshape(y.shape)
    y = y.reshape(*x.shape[:-1], layer.width)
    magnitude = magnitude.reshape(y.shape)
    if residual is not None:
        y, magnitude = y + residual, magnitude + np.abs(residual)
    return y, EPILOGUE_RTOL * magnitude


def random_linear(
    rng: np.random.Generator, n: int, k: int, activation: str = "", bias: bool = True
) -> Linear:
    """A layer whose outputs for unit-variance inputs have a standard deviation of about 2."""
    weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
    scale = (rng.uniform(0.5, 1.5, n) * 2 / (74 * np.sqrt(k))).astype(np.float32)
    return Linear(
        weight, scale, rng.normal(size=n).astype(np.float32) if bias else None, activation
    )


def assert_matches(layer: Linear, x: NDArray, residual: NDArray | None, y: NDArray) -> None:
    expected, tolerance = reference(layer, x, residual)
    assert y.shape == expected.shape
    excess = np.abs(y - expected) - tolerance
    assert not (excess > 0).any(), f"off by {np.abs(y - expected).max()}, {excess.max()} too much"
