"""Int8 weights of a mixture's experts: quantized and packed one expert at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glmcompile.quantize.packing import interleave_gate_up, packed_shape
from glmcompile.quantize.weights import Float, QuantizedWeight, quantize_weight


class Weights(Protocol):
    """What is asked of all experts' weights: an array, memory-mapped or not, or a reader."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, expert: int, /) -> NDArray: ...


class Channels(Enum):
    """What a layer's output channels are, as the checkpoint orders them."""

    PLAIN = "plain"  # no gate: down projections, and up projections of experts without one
    CONCATENATED = "concatenated"  # all gates, then all ups
    INTERLEAVED = "interleaved"  # a gate, its up, the next gate, as gpt-oss has them


@dataclass(frozen=True)
class QuantizedExperts:
    """One layer of E experts, `[E, N, K]`, as MoEW8A8 reads it.

    packed: int8 `[E, N/16, K/64, 16, 16, 4]`; scale: float32 `[E, N]`; sum: int32 `[E, N]`;
    input_scale: float32 `[E, K]`, None without smoothing. Gates and ups alternate in blocks of 16.
    """

    packed: NDArray[np.int8]
    scale: Float
    sum: NDArray[np.int32]
    input_scale: Float | None


def quantize_experts(
    weight: Weights,
    channels: Channels = Channels.PLAIN,
    transposed: bool = False,
    activation_absmax: Sequence[Float | None] | Float | None = None,
    smoothing: float = 0.0,
) -> QuantizedExperts:
    """Quantize and pack one layer of all experts.

    Args:
        weight: `[E, out, in]`, any float type; it is read one expert at a time.
        channels: what the out channels are.
        transposed: the weight is `[E, in, out]`, as gpt-oss stores it.
        activation_absmax: per expert float32 `[in]` from calibration, None or zeros for an expert
            that no sample reached, which stays unsmoothed.
        smoothing: SmoothQuant's strength, 0 for none.

    Raises:
        ValueError: the weight is not three-dimensional, gates and ups are not whole blocks of 16,
            or activation_absmax has not one entry per expert.
    """
    if len(weight.shape) != 3 or 0 in weight.shape:
        raise ValueError(f"expected a weight [experts, out, in], got shape {weight.shape}")
    experts, out_features, in_features = weight.shape
    if transposed:
        out_features, in_features = in_features, out_features
    absmax = [None] * experts if activation_absmax is None else activation_absmax
    if len(absmax) != experts:
        raise ValueError(f"expected activation_absmax of {experts} experts, got {len(absmax)}")
    _check_blocks(out_features, channels)
    result = QuantizedExperts(
        np.empty((experts, *packed_shape(out_features, in_features)), np.int8),
        np.empty((experts, out_features), np.float32),
        np.empty((experts, out_features), np.int32),
        np.ones((experts, in_features), np.float32) if smoothing > 0 else None,
    )
    for expert in range(experts):
        matrix = np.asarray(weight[expert], np.float32)
        if transposed:
            matrix = np.ascontiguousarray(matrix.T)
        one = _quantize(matrix, channels, absmax[expert], smoothing)
        result.packed[expert] = one.packed
        result.scale[expert] = one.scale
        result.sum[expert] = one.sum
        if result.input_scale is not None and one.input_scale is not None:
            result.input_scale[expert] = one.input_scale
    return result


def arrange_bias(bias: NDArray, channels: Channels) -> Float:
    """A layer's bias `[E, N]` in the order of its quantized channels, float32.

    Raises:
        ValueError: gates and ups are not whole blocks of 16.
    """
    _check_blocks(bias.shape[1], channels)
    bias = np.asarray(bias, np.float32)
    if channels is Channels.PLAIN:
        return bias
    gates, ups = _gates_and_ups(bias.T, channels)
    return np.ascontiguousarray(interleave_gate_up(gates, ups).T)


def _quantize(
    matrix: Float, channels: Channels, absmax: Float | None, smoothing: float
) -> QuantizedWeight:
    gated = channels is not Channels.PLAIN
    if gated:
        matrix = np.concatenate(_gates_and_ups(matrix, channels))
    if absmax is None or not absmax.any():
        return quantize_weight(matrix, swiglu=gated)
    return quantize_weight(matrix, absmax, smoothing, swiglu=gated)


def _gates_and_ups(rows: NDArray, channels: Channels) -> tuple[NDArray, NDArray]:
    if channels is Channels.INTERLEAVED:
        return rows[0::2], rows[1::2]
    half = len(rows) // 2
    return rows[:half], rows[half:]


def _check_blocks(out_features: int, channels: Channels) -> None:
    if channels is not Channels.PLAIN and out_features % 32:
        raise ValueError(
            f"expected a multiple of 32 channels, gates and ups in blocks of 16, got {out_features}"
        )
