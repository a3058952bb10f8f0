"""Int8 weights: rounding error, SmoothQuant keeps the product, packing keeps the values."""

from __future__ import annotations

import numpy as np
import pytest

from glmcompile.quantize.packing import unpack_weight
from glmcompile.quantize.weights import quantize_rows, quantize_weight, smoothing_scales

RNG = np.random.default_rng(0)


def test_rounding_is_within_half_a_step() -> None:
    weight = RNG.normal(size=(32, 96)).astype(np.float32)
    values, scale = quantize_rows(weight)
    assert values.min() >= -127
    assert np.abs(values * scale[:, None] - weight).max() <= scale.max() / 2 * 1.001


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = quantize_rows(np.zeros((2, 8), np.float32))
    assert not values.any()
    assert np.isfinite(scale).all()


def test_smoothing_keeps_the_product_and_moves_outliers_into_the_weight() -> None:
    x = RNG.normal(size=(64, 16)).astype(np.float32)
    x[:, 3] *= 50
    weight = RNG.normal(size=(8, 16)).astype(np.float32)
    absmax = np.abs(x).max(axis=0)
    factors = smoothing_scales(absmax, weight, 0.5)
    np.testing.assert_allclose((x / factors) @ (weight * factors).T, x @ weight.T, rtol=1e-3)
    before, after = absmax.max() / np.median(absmax), (absmax / factors)
    assert after.max() / np.median(after) < before / 3


def test_channels_that_never_fire_are_left_alone() -> None:
    absmax = np.array([0.0, 2.0], np.float32)
    factors = smoothing_scales(absmax, np.ones((4, 2), np.float32), 0.5)
    assert factors[0] == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_packed_weight_gives_the_layers_output(smoothing: float) -> None:
    x = RNG.normal(size=(10, 70)).astype(np.float32)
    weight = RNG.normal(size=(24, 70)).astype(np.float32)
    quantized = quantize_weight(weight, np.abs(x).max(axis=0), smoothing)
    values = unpack_weight(quantized.packed, 24, 70)
    np.testing.assert_array_equal(quantized.sum, values.sum(axis=1))
    inputs = x if quantized.input_scale is None else x * quantized.input_scale
    output = inputs @ (values * quantized.scale[:, None]).T
    assert np.abs(output - x @ weight.T).max() < 0.02 * np.abs(x @ weight.T).max()


def test_gate_and_up_are_interleaved_in_blocks_of_sixteen() -> None:
    weight = np.arange(1, 65, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    scale = quantize_weight(weight, swiglu=True).scale * 127
    np.testing.assert_allclose(scale[:16], np.arange(1, 17))
    np.testing.assert_allclose(scale[16:32], np.arange(33, 49))
