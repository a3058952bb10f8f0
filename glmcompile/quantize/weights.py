"""Int8 weights: SmoothQuant scales, rounding per output channel, packed tensors read lazily."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmcompile.quantize.packing import interleave_gate_up, pack_weight, weight_sum

Float = NDArray[np.float32]
_ROWS = 1024  # quantized at a time: a large weight is never copied whole


@dataclass(frozen=True)
class QuantizedWeight:
    """An `[N, K]` weight as the native operators read it.

    packed: int8 `[N/16, K/64, 16, 16, 4]`; scale: float32 `[N]`; sum: int32 `[N]`, over K;
    input_scale: float32 `[K]`, what the input is to be multiplied by, None without smoothing.
    """

    packed: NDArray[np.int8]
    scale: Float
    sum: NDArray[np.int32]
    input_scale: Float | None


def smoothing_scales(activation_absmax: Float, weight: Float, strength: float) -> Float:
    """SmoothQuant's per-channel factors `s`, float32 `[K]`: x / s and weight * s leave the product.

    s = max|x| ** strength / max|weight| ** (1 - strength), channels that never fire stay at 1
    (Xiao et al., "SmoothQuant", 2023, equation 4).
    """
    weight_absmax = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    scales = np.ones_like(activation_absmax)
    alive = (activation_absmax > 1e-5) & (weight_absmax > 1e-5)
    scales[alive] = activation_absmax[alive] ** strength / weight_absmax[alive] ** (1 - strength)
    return scales.astype(np.float32)


def quantize_rows(weight: Float, factors: Float | None = None) -> tuple[NDArray[np.int8], Float]:
    """Symmetric int8 per row: values int8 `[N, K]` in -127..127 and scales float32 `[N]`.

    factors: float32 `[K]`, what the columns are multiplied by first.
    """
    values = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows] if factors is None else weight[rows] * factors
        scale[rows] = np.abs(block).max(axis=1) / np.float32(127)
        scale[rows][scale[rows] == 0] = 1
        values[rows] = np.rint(block / scale[rows][:, None])
    return values, scale


def quantize_weight(
    weight: Float,
    activation_absmax: Float | None = None,
    smoothing: float = 0.0,
    swiglu: bool = False,
) -> QuantizedWeight:
    """Quantize and pack a linear layer's weight, float32 `[N, K]`.

    activation_absmax: float32 `[K]` from calibration, needed where smoothing > 0.
    swiglu: the rows are gate over up, and the operator wants them interleaved.
    """
    factors = input_scale = None
    if smoothing > 0:
        assert activation_absmax is not None
        factors = smoothing_scales(activation_absmax, weight, smoothing)
        input_scale = (1 / factors).astype(np.float32)
    values, scale = quantize_rows(weight, factors)
    if swiglu:
        half = len(values) // 2
        values = interleave_gate_up(values[:half], values[half:])
        scale = interleave_gate_up(scale[:half], scale[half:])
    return QuantizedWeight(pack_weight(values), scale, weight_sum(values), input_scale)
