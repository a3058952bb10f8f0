"""MoE and MoEW8A8 on unusual activations, and their messages for malformed inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.native import moe_w8a8_reference
from tests.native.moe_reference import ISAS, Gating, moe_session, random_experts, route
from tests.native.moe_w8a8_reference import random_quantized

ERRORS = (Fail, InvalidArgument, RuntimeException)
TOKENS, WIDTH, INNER, EXPERTS, CHOICES = 3, 40, 16, 4, 2


def zeros(*shape: int, dtype: type = np.float32) -> NDArray:
    return np.zeros(shape, dtype)


def run_float(attributes: dict[str, Any] | None = None, **changes: NDArray) -> NDArray:
    """MoE with an input or attribute that differs from the sizes above."""
    rng = np.random.default_rng(0)
    experts = random_experts(rng, EXPERTS, WIDTH, INNER, bias=True)
    inputs = {**route(rng, TOKENS, WIDTH, EXPERTS, CHOICES), **experts.constants(), **changes}
    attributes = {**experts.attributes(), **(attributes or {})}
    return moe_session("MoE", inputs, {}, attributes).run(None, inputs)[0]


def run_int8(attributes: dict[str, Any] | None = None, **changes: NDArray) -> NDArray:
    rng = np.random.default_rng(0)
    experts = random_quantized(rng, EXPERTS, WIDTH, INNER, bias=True, smooth=True)
    inputs = {**route(rng, TOKENS, WIDTH, EXPERTS, CHOICES), **experts.constants(), **changes}
    attributes = {**experts.gating.attributes(), **(attributes or {})}
    order, optional = moe_w8a8_reference.INPUTS, moe_w8a8_reference.OPTIONAL
    session = moe_session("MoEW8A8", inputs, {}, attributes, order=order, optional=optional)
    return session.run(None, inputs)[0]


def index_with(value: int) -> NDArray[np.int64]:
    index = zeros(TOKENS, CHOICES, dtype=np.int64)
    index[2, 1] = value
    return index


SHARED = [
    ("x", zeros(3, 4, 10), r"x: expected \[tokens, H\], got \[3, 4, 10\]"),
    ("x", zeros(4, 40), r"top_k_index: expected \[4, k\] for x \[4, 40\], got \[3, 2\]"),
    ("x", zeros(3, 0), r"x: expected \[tokens, H\], got \[3, 0\]"),
    ("top_k_index", zeros(6, dtype=np.int64), r"top_k_index: expected \[3, k\] .* got \[6\]"),
    ("top_k_weights", zeros(3, 1), r"top_k_weights: expected .* = \[3, 2\], got \[3, 1\]"),
    ("top_k_index", index_with(4), r"top_k_index\[2, 1\]: expected an expert from 0 to 3, got 4"),
    ("top_k_index", index_with(-1), r"top_k_index\[2, 1\]: expected .* got -1"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *SHARED,
        ("up", zeros(4, 32, 41), r"up: expected \[E, N, H\] with H = 40, got \[4, 32, 41\]"),
        ("up", zeros(32, 40), r"up: expected \[E, N, H\] .* got \[32, 40\]"),
        ("up", zeros(4, 31, 40), r"up: expected \[E, N, H\] with an even N, .* got \[4, 31, 40\]"),
        ("up", zeros(0, 32, 40), r"up: expected \[E, N, H\] .* got \[0, 32, 40\]"),
        ("down", zeros(4, 40, 32), r"down: expected \[E, H, I\] = \[4, 40, 16\], got \[4, 40, 32"),
        ("down", zeros(3, 40, 16), r"down: expected .* = \[4, 40, 16\], got \[3, 40, 16\]"),
        ("up_bias", zeros(4, 16), r"up_bias: expected \[E, N\] = \[4, 32\], got \[4, 16\]"),
        ("down_bias", zeros(40), r"down_bias: expected \[E, H\] = \[4, 40\], got \[40\]"),
    ],
)
def test_malformed_inputs_are_named(name: str, value: NDArray, message: str) -> None:
    with pytest.raises(ERRORS, match=f"MoE: {message}"):
        run_float(**{name: value})


def test_transposed_weights_are_named_as_such() -> None:
    with pytest.raises(ERRORS, match=r"up: expected \[E, H, N\] with H = 40, got \[4, 32, 40\]"):
        run_float({"transposed": 1})
    with pytest.raises(ERRORS, match=r"down: expected \[E, I, H\] = \[4, 16, 40\], got"):
        run_float({"transposed": 1}, up=zeros(4, 40, 32))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *SHARED,
        (
            "up",
            zeros(4, 2, 1, 16, 16, 4, dtype=np.int8)[:3],
            r"up: expected the packed form of \[E, out, in\] = \[4, 2, 1, 16, 16, 4\], got \[3, 2,",
        ),
        ("up_scale", zeros(4, 48), r"up_scale: expected \[E, N\] with a multiple of 32 .* 48\]"),
        ("up_scale", zeros(32), r"up_scale: expected \[E, N\], got \[32\]"),
        ("up_sum", zeros(4, 16, dtype=np.int32), r"up_sum: expected \[E, out\] = \[4, 32\], got"),
        ("down", zeros(4, 40, 16, dtype=np.int8), r"down: expected .* = \[4, 3, 1, 16, 16, 4\]"),
        ("down_scale", zeros(4, 48), r"down_scale: expected .* = \[4, 40\], got \[4, 48\]"),
        ("down_sum", zeros(1, dtype=np.int32), r"down_sum: expected .* = \[4, 40\], got \[1\]"),
        ("up_bias", zeros(4, 16), r"up_bias: expected .* = \[4, 32\], got \[4, 16\]"),
        ("down_bias", zeros(40), r"down_bias: expected .* = \[4, 40\], got \[40\]"),
        ("up_input_scale", zeros(40), r"up_input_scale: expected \[E, in\] = \[4, 40\], got \[40"),
        ("down_input_scale", zeros(4, 40), r"down_input_scale: expected .* = \[4, 16\], got"),
    ],
)
def test_malformed_int8_inputs_are_named(name: str, value: NDArray, message: str) -> None:
    with pytest.raises(ERRORS, match=f"MoEW8A8: {message}"):
        run_int8(**{name: value})


@pytest.mark.parametrize("run", [run_float, run_int8])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activation": "swiglu"}, 'attribute activation: "swiglu" is none of silu, gelu,'),
        ({"gated": 2}, "attribute gated: expected 0 or 1, got 2"),
        ({"activation": "clamped_swiglu", "limit": 7.0}, "attribute alpha is required"),
        ({"activation": "clamped_swiglu", "alpha": 1.7}, "attribute limit is required"),
        (
            {"activation": "clamped_swiglu", "alpha": 1.7, "limit": 0.0},
            "attribute limit: expected a finite number > 0, got 0",
        ),
        (
            {"activation": "clamped_swiglu", "alpha": 1.7, "limit": 7.0, "gated": 0},
            "attribute gated: expected 1 with clamped_swiglu, got 0",
        ),
        ({"limit": -1.0}, "attribute limit: expected a finite number >= 0, got -1"),
        ({"limit": 1.0, "gated": 0}, "attribute limit: expected 0 without a gate, got 1"),
        ({"limit": 1.0, "limit_activated": 3}, "attribute limit_activated: expected 0 or 1"),
    ],
)
def test_malformed_attributes_are_named(run: Any, attributes: dict, message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        run(attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"transposed": -1}, "attribute transposed: expected 0 or 1, got -1"),
        ({"interleaved": 1, "gated": 0}, "attribute interleaved: expected 0 without a gate, got 1"),
    ],
)
def test_malformed_layouts_are_named(attributes: dict, message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        run_float(attributes)


def test_the_activation_is_required() -> None:
    inputs = route(np.random.default_rng(0), 1, WIDTH, EXPERTS, 1)
    with pytest.raises(ERRORS, match="attribute activation is required"):
        moe_session("MoE", inputs, {"up": zeros(4, 32, 40), "down": zeros(4, 40, 16)}, {})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gating", [Gating(), Gating("relu"), Gating("silu", limit=1.0)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_leaves_the_others_alone(
    isa: str, gating: Gating, int8: bool, bad: float
) -> None:
    rng = np.random.default_rng(1)
    experts = (random_quantized if int8 else random_experts)(rng, 4, 90, 32, gating)
    inputs = route(rng, 20, 90, 4, 2)
    good = experts.run(inputs, isa)
    inputs["x"][[2, 17], [0, 89]] = bad
    y = experts.run(inputs, isa)
    if np.isnan(bad) or int8:
        assert np.isnan(y[[2, 17]]).all()
    others = np.delete(np.arange(20), [2, 17])
    np.testing.assert_array_equal(y[others], good[others])


@pytest.mark.parametrize("constant", [(), ("up", "down")])
def test_weights_may_be_initializers_or_inputs(constant: tuple[str, ...]) -> None:
    rng = np.random.default_rng(2)
    experts = random_experts(rng, EXPERTS, WIDTH, INNER, bias=True)
    given = {**route(rng, TOKENS, WIDTH, EXPERTS, CHOICES), **experts.constants()}
    constants = {name: given[name] for name in constant}
    inputs = {name: value for name, value in given.items() if name not in constants}
    session = moe_session("MoE", inputs, constants, experts.attributes())
    expected = experts.run({name: given[name] for name in ("x", "top_k_index", "top_k_weights")})
    np.testing.assert_array_equal(session.run(None, inputs)[0], expected)
