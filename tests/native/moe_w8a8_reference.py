"""References of MoEW8A8: exact integers, and float64 where float32 rounding comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.quantize.experts import Channels, QuantizedExperts, arrange_bias, quantize_experts
from glmcompile.quantize.packing import unpack_weight
from tests.native.linear_reference import quantize
from tests.native.moe_reference import (
    RTOL,
    Experts,
    Float,
    Gating,
    assert_close,
    moe_session,
    random_experts,
    route,
)

INPUTS = (
    *("x", "top_k_index", "top_k_weights", "up", "up_scale", "up_sum"),
    *("down", "down_scale", "down_sum"),
)
OPTIONAL = ("up_bias", "down_bias", "up_input_scale", "down_input_scale")


@dataclass
class ExpertsW8A8:
    """The quantized form of experts; biases in the order of the quantized channels."""

    up: QuantizedExperts
    down: QuantizedExperts
    gating: Gating
    up_bias: NDArray[np.float32] | None
    down_bias: NDArray[np.float32] | None

    @property
    def width(self) -> int:
        return self.down.scale.shape[1]

    @property
    def inner(self) -> int:
        return self.up.scale.shape[1] // (2 if self.gating.gated else 1)

    def constants(self) -> dict[str, NDArray]:
        arrays: dict[str, NDArray | None] = {"up_bias": self.up_bias, "down_bias": self.down_bias}
        for name, layer in (("up", self.up), ("down", self.down)):
            arrays |= {
                name: layer.packed,
                f"{name}_scale": layer.scale,
                f"{name}_sum": layer.sum,
                f"{name}_input_scale": layer.input_scale,
            }
        return {name: value for name, value in arrays.items() if value is not None}

    def session(self, isa: str = "", threads: int = 2) -> ort.InferenceSession:
        inputs = route(np.random.default_rng(0), 1, self.width, len(self.up.scale), 1)
        return moe_session(
            "MoEW8A8",
            inputs,
            self.constants(),
            self.gating.attributes(),
            isa,
            threads,
            INPUTS,
            OPTIONAL,
        )

    def run(self, inputs: dict[str, NDArray], isa: str = "", threads: int = 2) -> NDArray:
        return self.session(isa, threads).run(None, inputs)[0]


def quantized(experts: Experts, absmax: tuple[Any, Any] = (None, None)) -> ExpertsW8A8:
    """absmax: of the inputs of up and down, per expert, for smoothing."""
    channels = Channels.CONCATENATED if experts.gating.gated else Channels.PLAIN
    strengths = [0.0 if part is None else 0.5 for part in absmax]
    return ExpertsW8A8(
        quantize_experts(experts.up, channels, False, absmax[0], strengths[0]),
        quantize_experts(experts.down, Channels.PLAIN, False, absmax[1], strengths[1]),
        experts.gating,
        None if experts.up_bias is None else arrange_bias(experts.up_bias, channels),
        experts.down_bias,
    )


def random_quantized(
    rng: np.random.Generator,
    experts: int,
    width: int,
    inner: int,
    gating: Gating | None = None,
    bias: bool = False,
    smooth: bool = False,
) -> ExpertsW8A8:
    absmax: tuple[Any, Any] = (None, None)
    if smooth:
        sizes = (width, inner)
        absmax = tuple(rng.uniform(0.1, 9, (experts, n)).astype(np.float32) for n in sizes)
    return quantized(random_experts(rng, experts, width, inner, gating, bias), absmax)


def _matrix(layer: QuantizedExperts, expert: int, in_features: int) -> Float:
    out_features = layer.scale.shape[1]
    return unpack_weight(layer.packed[expert], out_features, in_features).astype(np.float64)


def _product(
    layer: QuantizedExperts,
    expert: int,
    x: Float,
    error: Float,
    bias: NDArray[np.float32] | None,
) -> tuple[Float, Float]:
    """A layer's result for rows within `error`, and its error: a rounding may go the other way."""
    rows = x.astype(np.float32)
    if layer.input_scale is not None:
        rows = rows * layer.input_scale[expert]
        error = error * layer.input_scale[expert]
    weight, scales = _matrix(layer, expert, x.shape[1]), layer.scale[expert].astype(np.float64)
    offset = 0.0 if bias is None else bias[expert].astype(np.float64)
    if len(rows) == 0:
        return np.zeros((0, len(scales))), np.zeros((0, len(scales)))
    q, scale, zero_point = quantize(rows)
    centered = (q - zero_point).astype(np.float64)  # integers: their sums are exact, and fast
    steps = rows.astype(np.float64) / scale
    relative = error.max(axis=1, keepdims=True) / (255 * scale) * 2 + 1e-6 * (error.max() > 0)
    unsure = (error / scale + np.abs(steps) * relative) > 0.5 - np.abs(steps - np.rint(steps))
    lowest = np.minimum(rows.min(axis=1, keepdims=True), 0) / scale.astype(np.float64)
    tie = 0.5 - np.abs(lowest - np.rint(lowest)) < 256 * relative
    unsure |= tie & ((q == 0) | (q == 255))
    product = centered @ weight.T * (scale * scales)
    flipped = unsure.astype(np.float64) @ np.abs(weight).T * (scale * scales)
    magnitude = np.abs(product) * (1 + relative / RTOL) + np.abs(offset)
    return product + offset, RTOL * magnitude + flipped


def reference(experts: ExpertsW8A8, inputs: dict[str, NDArray]) -> tuple[Float, Float]:
    """Result `[tokens, H]` in float64 and the absolute tolerance for it."""
    x = inputs["x"].astype(np.float64)
    y, tolerance = np.zeros_like(x), np.zeros_like(x)
    for expert in range(len(experts.up.scale)):
        tokens, choice = np.nonzero(inputs["top_k_index"] == expert)
        weight = inputs["top_k_weights"][tokens, choice].astype(np.float64)[:, None]
        rows = x[tokens]
        pre, error = _product(experts.up, expert, rows, np.zeros_like(rows), experts.up_bias)
        if experts.gating.gated:
            pre, error = (_gates_over_ups(part) for part in (pre, error))
        hidden, error = experts.gating.apply(pre, error)
        out, error = _product(experts.down, expert, hidden, error, experts.down_bias)
        np.add.at(y, tokens, weight * out)
        np.add.at(tolerance, tokens, np.abs(weight) * (error + RTOL * np.abs(out)))
    return y, tolerance


def _gates_over_ups(blocks: Float) -> Float:
    pairs = blocks.reshape(len(blocks), blocks.shape[1] // 32, 2, 16)
    return pairs.swapaxes(1, 2).reshape(blocks.shape)


def assert_matches(experts: ExpertsW8A8, inputs: dict[str, NDArray], y: NDArray) -> None:
    assert_close(y, *reference(experts, inputs))
