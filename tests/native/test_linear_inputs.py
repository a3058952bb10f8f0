"""LinearW8A8 on unusual activations, and its messages for malformed inputs and attributes."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.native.linear_reference import ISAS, assert_matches, one_node_session, random_linear

ERRORS = (Fail, InvalidArgument, RuntimeException)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_range_give_the_bias(isa: str) -> None:
    layer = random_linear(np.random.default_rng(0), 40, 100)
    x = np.zeros((20, 100), np.float32)
    x[3] = 1e-44
    x[4] = -1e-40
    assert layer.bias is not None
    y = layer.run(x, isa=isa)
    np.testing.assert_array_equal(y, np.broadcast_to(layer.bias, y.shape))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(
    isa: str, bad: float
) -> None:
    rng = np.random.default_rng(1)
    layer = random_linear(rng, 64, 90, "swiglu")
    x = rng.normal(size=(20, 90)).astype(np.float32)
    good = layer.run(x, isa=isa)
    x[[2, 17], [0, 89]] = bad
    y = layer.run(x, isa=isa)
    assert np.isnan(y[[2, 17]]).all()
    others = np.delete(np.arange(20), [2, 17])
    np.testing.assert_array_equal(y[others], good[others])


@pytest.mark.parametrize("isa", ISAS)
def test_a_range_beyond_float32_becomes_nan(isa: str) -> None:
    layer = random_linear(np.random.default_rng(2), 16, 64)
    x = np.zeros((1, 64), np.float32)
    x[0, :2] = 3e38, -3e38
    assert np.isnan(layer.run(x, isa=isa)).all()
    layer.rms_epsilon, layer.input_scale = 1e-5, np.full(64, 1e-9, np.float32)
    assert np.isnan(layer.run(x, isa=isa)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_large_and_tiny_rows(isa: str, sign: int) -> None:
    rng = np.random.default_rng(3)
    layer = random_linear(rng, 33, 70, bias=False)
    x = sign * np.abs(rng.normal(size=(6, 70))) * np.array([[1e-30, 1e-6, 1, 1e3, 1e10, 1e25]]).T
    assert_matches(layer, x.astype(np.float32), None, layer.run(x.astype(np.float32), isa=isa))


@pytest.mark.parametrize("isa", ISAS)
def test_static_ranges_clamp_everything_outside(isa: str) -> None:
    layer = random_linear(np.random.default_rng(4), 16, 64, bias=False)
    layer.static = (0.5, 100)
    x = np.full((1, 64), 1e30, np.float32)
    for value, inside in ((1e30, 77.5), (-1e30, -50.0), (np.inf, 77.5), (np.nan, -50.0)):
        x[:] = value
        expected = layer.run(np.full((1, 64), inside, np.float32), isa=isa)
        np.testing.assert_array_equal(layer.run(x, isa=isa), expected)


def test_a_normalization_needs_its_weight() -> None:
    layer = random_linear(np.random.default_rng(4), 16, 64)
    layer.rms_epsilon = 1e-5
    with pytest.raises(ERRORS, match="LinearW8A8: input_scale: needed beside rms_epsilon"):
        layer.run(np.ones((1, 64), np.float32))


def changed_inputs(**changes: np.ndarray) -> None:
    layer = random_linear(np.random.default_rng(5), 40, 100)
    inputs = {"x": np.zeros((3, 100), np.float32), **layer.constants(), **changes}
    one_node_session("LinearW8A8", inputs, {}, layer.attributes()).run(None, inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((3, 99), np.float32), r"x: expected \[..., 100\], got \[3, 99\]"),
        ("x", np.zeros((), np.float32), r"x: expected \[..., 100\], got \[\]"),
        ("weight", np.zeros((3, 1, 16, 16, 4), np.int8), r"weight: expected \[3, 2, 16, 16, 4\]"),
        ("weight", np.zeros((40, 100), np.int8), r"weight: expected .* got \[40, 100\]"),
        ("weight_scale", np.zeros(48, np.float32), r"weight_scale: expected \[40\], got \[48\]"),
        ("weight_sum", np.zeros((1, 40), np.int32), r"weight_sum: expected \[40\], got \[1, 40\]"),
        ("bias", np.zeros(1, np.float32), r"bias: expected \[40\], got \[1\]"),
        ("residual", np.zeros((40,), np.float32), r"residual: expected .* 40 .* got \[40\]"),
        ("residual", np.zeros((2, 40), np.float32), r"residual: expected .* got \[2, 40\]"),
    ],
)
def test_malformed_inputs_are_named(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ERRORS, match=f"LinearW8A8: {message}"):
        changed_inputs(**{name: value})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"out_features": 40}, "attribute in_features is required"),
        ({"in_features": 100}, "attribute out_features is required"),
        ({"in_features": 0, "out_features": 40}, "in_features: expected 1 to 65536, got 0"),
        ({"in_features": 65537, "out_features": 40}, "in_features: .* got 65537"),
        ({"in_features": 100, "out_features": -1}, "out_features: expected a positive number"),
        (
            {"in_features": 100, "out_features": 40, "activation": "swiglu"},
            "expected a multiple of 32 with swiglu, got 40",
        ),
        ({"in_features": 100, "out_features": 40, "activation": "relu"}, '"relu" is none of'),
        (
            {"in_features": 100, "out_features": 40, "activation_scale": -1.0},
            "activation_scale: expected a finite number >= 0",
        ),
        (
            {"in_features": 100, "out_features": 40, "activation_zero_point": 0.5},
            "activation_zero_point: expected an integer in 0 to 255",
        ),
        (
            {"in_features": 100, "out_features": 40, "rms_epsilon": -1e-5},
            "rms_epsilon: expected a finite number >= 0",
        ),
        (
            {
                "in_features": 100,
                "out_features": 40,
                "rms_epsilon": 1e-5,
                "activation_scale": 0.5,
            },
            "rms_epsilon: expected 0 with activation_scale",
        ),
    ],
)
def test_malformed_attributes_are_named(attributes: dict, message: str) -> None:
    layer = random_linear(np.random.default_rng(6), 40, 100)
    with pytest.raises(ERRORS, match=message):
        one_node_session(
            "LinearW8A8", {"x": np.zeros((1, 100), np.float32)}, layer.constants(), attributes
        )


def test_an_unknown_instruction_set_is_refused() -> None:
    layer = random_linear(np.random.default_rng(7), 16, 64)
    with pytest.raises(ERRORS, match="GLMCOMPILE_ISA"):
        layer.run(np.zeros((1, 64), np.float32), isa="sse9")


def test_malformed_initializers_fail_when_the_session_is_created() -> None:
    layer = random_linear(np.random.default_rng(8), 40, 100)
    constants = {**layer.constants(), "weight_scale": np.ones(39, np.float32)}
    x = np.zeros((1, 100), np.float32)
    with pytest.raises(ERRORS, match=r"weight_scale: expected \[40\], got \[39\]"):
        one_node_session("LinearW8A8", {"x": x}, constants, layer.attributes())


@pytest.mark.parametrize("constant", [(), ("bias",), ("weight", "weight_scale", "weight_sum")])
def test_parameters_may_be_initializers_or_inputs(constant: tuple[str, ...]) -> None:
    rng = np.random.default_rng(9)
    layer = random_linear(rng, 40, 100)
    given = {"x": rng.normal(size=(5, 100)).astype(np.float32), **layer.constants()}
    constants = {name: given[name] for name in constant}
    inputs = {name: value for name, value in given.items() if name not in constants}
    session = one_node_session("LinearW8A8", inputs, constants, layer.attributes())
    assert_matches(layer, given["x"], None, session.run(None, inputs)[0])
