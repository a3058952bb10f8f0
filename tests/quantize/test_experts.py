"""Experts are quantized as linear layers are, one by one, from every layout of checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from glmcompile.quantize.experts import Channels, QuantizedExperts, arrange_bias, quantize_experts
from glmcompile.quantize.packing import interleave_gate_up, packed_shape
from glmcompile.quantize.weights import quantize_weight


@pytest.fixture
def weight() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(3, 64, 70)).astype(np.float32)


def assert_equal(a: QuantizedExperts, b: QuantizedExperts) -> None:
    for field in ("packed", "scale", "sum"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("channels", [Channels.PLAIN, Channels.CONCATENATED])
def test_every_expert_is_a_quantized_weight(
    weight: NDArray[np.float32], channels: Channels
) -> None:
    experts = quantize_experts(weight, channels)
    assert experts.packed.shape == (3, *packed_shape(64, 70))
    assert experts.input_scale is None
    for index, matrix in enumerate(weight):
        one = quantize_weight(matrix, swiglu=channels is Channels.CONCATENATED)
        np.testing.assert_array_equal(experts.packed[index], one.packed)
        np.testing.assert_array_equal(experts.scale[index], one.scale)
        np.testing.assert_array_equal(experts.sum[index], one.sum)


def test_layouts_of_checkpoints_give_the_same_experts(weight: NDArray[np.float32]) -> None:
    expected = quantize_experts(weight, Channels.CONCATENATED)
    in_turns = np.stack(np.split(weight, 2, axis=1), axis=2).reshape(weight.shape)
    assert_equal(quantize_experts(in_turns, Channels.INTERLEAVED), expected)
    gpt_oss = np.ascontiguousarray(in_turns.swapaxes(1, 2))
    assert_equal(quantize_experts(gpt_oss, Channels.INTERLEAVED, transposed=True), expected)
    llama4 = np.ascontiguousarray(weight.swapaxes(1, 2))
    assert_equal(quantize_experts(llama4, Channels.CONCATENATED, transposed=True), expected)


@pytest.mark.parametrize("absent", [None, np.zeros(70, np.float32)])
def test_experts_that_no_sample_reached_stay_unsmoothed(
    weight: NDArray[np.float32], absent: NDArray[np.float32] | None
) -> None:
    absmax = np.random.default_rng(1).uniform(0.1, 5, 70).astype(np.float32)
    experts = quantize_experts(weight, activation_absmax=[absmax, absent, absmax], smoothing=0.5)
    smoothed, plain = quantize_weight(weight[0], absmax, 0.5), quantize_weight(weight[1])
    assert experts.input_scale is not None
    np.testing.assert_array_equal(experts.input_scale[0], smoothed.input_scale)
    np.testing.assert_array_equal(experts.input_scale[1], np.ones(70))
    np.testing.assert_array_equal(experts.packed[0], smoothed.packed)
    np.testing.assert_array_equal(experts.packed[1], plain.packed)


def test_no_sample_at_all_leaves_every_expert_unsmoothed(weight: NDArray[np.float32]) -> None:
    experts = quantize_experts(weight, smoothing=0.5)
    assert_equal(experts, quantize_experts(weight))
    np.testing.assert_array_equal(experts.input_scale, np.ones((3, 70)))


def test_one_expert_is_read_at_a_time(weight: NDArray[np.float32]) -> None:
    reads: list[int] = []

    class Stored:
        shape = weight.shape

        def __getitem__(self, index: int) -> NDArray[np.float16]:
            reads.append(index)
            return weight[index].astype(np.float16)

    experts = quantize_experts(Stored())
    assert reads == [0, 1, 2]
    assert_equal(experts, quantize_experts(weight.astype(np.float16)))


def test_biases_follow_their_channels() -> None:
    bias = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
    expected = np.stack([interleave_gate_up(row[:32], row[32:]) for row in bias])
    np.testing.assert_array_equal(arrange_bias(bias, Channels.CONCATENATED), expected)
    in_turns = np.stack(np.split(bias, 2, axis=1), axis=2).reshape(bias.shape)
    np.testing.assert_array_equal(arrange_bias(in_turns, Channels.INTERLEAVED), expected)
    np.testing.assert_array_equal(arrange_bias(bias, Channels.PLAIN), bias)


def test_what_cannot_be_packed_is_refused(weight: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match=r"\[experts, out, in\], got shape \(64, 70\)"):
        quantize_experts(weight[0])
    with pytest.raises(ValueError, match=r"multiple of 32 channels.* got 48"):
        quantize_experts(weight[:, :48], Channels.CONCATENATED)
    with pytest.raises(ValueError, match=r"multiple of 32 channels.* got 48"):
        arrange_bias(np.zeros((3, 48)), Channels.INTERLEAVED)
    with pytest.raises(ValueError, match="activation_absmax of 3 experts, got 2"):
        quantize_experts(weight, activation_absmax=[None, None], smoothing=0.5)
