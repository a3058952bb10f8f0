"""MoEW8A8 equals its reference, and LinearW8A8 bit for bit, for every kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from glmcompile.quantize.packing import unpack_weight
from tests.native.linear_reference import ISAS, Linear
from tests.native.moe_reference import (
    GATINGS,
    HALVES,
    Gating,
    random_experts,
    route,
    some_tokens,
)
from tests.native.moe_w8a8_reference import (
    ExpertsW8A8,
    assert_matches,
    quantized,
    random_quantized,
    reference,
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("width", "inner"), [(64, 96), (100, 32), (7, 16), (321, 48)])
def test_any_number_of_tokens_and_ragged_sizes(isa: str, width: int, inner: int) -> None:
    rng = np.random.default_rng(width * inner)
    experts = random_quantized(rng, 5, width, inner)
    session = experts.session(isa)
    for tokens in (0, 1, 2, 7, 40, 130):
        inputs = route(rng, tokens, width, 5, 2)
        assert_matches(experts, inputs, session.run(None, inputs)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_biases(isa: str, gating: Gating, bias: bool) -> None:
    rng = np.random.default_rng(1)
    inner = 48 if gating.gated else 45
    experts = random_quantized(rng, 4, 70, inner, gating, bias)
    inputs = route(rng, 19, 70, 4, 2)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("choices", range(9))
def test_any_number_of_choices(isa: str, choices: int) -> None:
    rng = np.random.default_rng(3)
    experts = random_quantized(rng, 8, 65, 48)
    inputs = route(rng, 23, 65, 8, choices)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gating", [Gating(), Gating("gelu_tanh"), Gating("relu2", gated=False)])
def test_input_scales_are_the_experts_own(isa: str, gating: Gating) -> None:
    rng = np.random.default_rng(4)
    experts = random_quantized(rng, 4, 130, 64, gating, bias=True, smooth=True)
    assert experts.up.input_scale is not None
    assert np.ptp(experts.up.input_scale, axis=0).min() > 0
    inputs = route(rng, 21, 130, 4, 2)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
def test_experts_without_tokens_and_one_that_gets_all(isa: str) -> None:
    rng = np.random.default_rng(5)
    experts = random_quantized(rng, 16, 130, 64)
    inputs = route(rng, 300, 130, 16, 2)
    inputs["top_k_index"][:] = [11, 3]
    inputs["top_k_index"][17] = [3, 3]
    experts.up.scale[[0, 15]] = np.nan
    y = experts.run(inputs, isa)
    experts.up.scale[[0, 15]] = 1
    assert_matches(experts, inputs, y)


def linear_layers(experts: ExpertsW8A8, expert: int, x: NDArray, isa: str) -> NDArray:
    """The same expert as two LinearW8A8."""
    y = x
    for layer, bias, activation in (
        (experts.up, experts.up_bias, "swiglu"),
        (experts.down, experts.down_bias, ""),
    ):
        scale = layer.scale[expert]
        linear = Linear(
            unpack_weight(layer.packed[expert], len(scale), y.shape[1]),
            scale,
            None if bias is None else bias[expert],
            activation,
            input_scale=None if layer.input_scale is None else layer.input_scale[expert],
        )
        y = linear.run(y, isa=isa)
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("smooth", [False, True])
def test_an_expert_gives_the_bits_of_two_linear_layers(isa: str, smooth: bool) -> None:
    rng = np.random.default_rng(6)
    experts = random_quantized(rng, 3, 200, 96, bias=True, smooth=smooth)
    inputs = route(rng, 75, 200, 3, 1)
    inputs["top_k_weights"][:] = 1
    y = experts.run(inputs, isa)
    for expert in range(3):
        tokens = np.flatnonzero(inputs["top_k_index"][:, 0] == expert)
        expected = linear_layers(experts, expert, inputs["x"][tokens], isa)
        np.testing.assert_array_equal(y[tokens], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gating", [Gating(), Gating("gelu")])
def test_a_token_does_not_depend_on_the_other_tokens_nor_on_threads(
    isa: str, gating: Gating
) -> None:
    rng = np.random.default_rng(7)
    experts = random_quantized(rng, 4, 300, 160, gating, bias=True, smooth=True)
    inputs = route(rng, 270, 300, 4, 2)
    session = experts.session(isa)
    together = session.run(None, inputs)[0]
    for tokens in (1, 2, 5, 8, 13, 33, 100):
        start = int(rng.integers(0, 271 - tokens))
        which = slice(start, start + tokens)
        some = session.run(None, some_tokens(inputs, which))[0]
        np.testing.assert_array_equal(some, together[which])
    np.testing.assert_array_equal(experts.run(inputs, isa, threads=1), together)


def test_long_prefills_are_processed_in_chunks() -> None:
    rng = np.random.default_rng(8)
    experts = random_quantized(rng, 8, 8192, 16)
    inputs = route(rng, 1000, 8192, 8, 8)
    session = experts.session()
    halves = [session.run(None, some_tokens(inputs, part))[0] for part in HALVES]
    np.testing.assert_array_equal(session.run(None, inputs)[0], np.concatenate(halves))


def test_eight_bits_stay_close_to_float() -> None:
    rng = np.random.default_rng(9)
    experts = random_experts(rng, 8, 256, 128)
    inputs = route(rng, 50, 256, 8, 2)
    exact = experts.run(inputs)
    error = quantized(experts).run(inputs) - exact
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(exact)


def test_the_tolerance_is_mostly_that_of_float32() -> None:
    rng = np.random.default_rng(10)
    experts = random_quantized(rng, 4, 256, 128)
    y, tolerance = reference(experts, route(rng, 50, 256, 4, 2))
    assert np.median(tolerance) < 1e-4 * np.abs(y).std()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_experts(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    gating = data.draw(st.sampled_from(GATINGS))
    count, choices = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    width, inner = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 12)) * 16
    bias, smooth = data.draw(st.booleans()), data.draw(st.booleans())
    experts = random_quantized(rng, count, width, inner, gating, bias, smooth)
    inputs = route(rng, data.draw(st.integers(0, 70)), width, count, min(choices, count))
    inputs["x"] *= 10.0 ** rng.uniform(-3, 3, (len(inputs["x"]), 1)).astype(np.float32)
    assert_matches(experts, inputs, experts.run(inputs, data.draw(st.sampled_from(ISAS))))
