"""Comparisons find the largest error, values that are no numbers, and layers that are broken."""

from __future__ import annotations

import numpy as np
import pytest

from glmcompile.compiler.comparison import (
    SHIPPED_LIMIT,
    ShippedError,
    compare,
    relative_error,
)
from glmcompile.errors import ParityError


def test_the_largest_error_is_found_with_its_place() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    actual = expected.copy()
    actual[1, 0] = 0.5
    difference = compare("decoder", "logits", "packed", expected, actual)
    assert difference.where == (1, 0)
    assert difference.max_error == pytest.approx(0.5 / 2.5)
    assert difference.mean_error == pytest.approx(0.5 / 4 / 2.5)


def test_a_value_that_is_no_number_is_the_largest_error() -> None:
    expected = np.ones((200, 3), np.float32)
    actual = expected.copy()
    actual[150, 2] = np.nan
    actual[3, 1] = 7
    worst = compare("decoder", "logits", "packed", expected, actual)
    assert worst.where == (150, 2)
    with pytest.raises(ParityError, match=r"^decoder: logits \(packed\).*worst at \[150, 2\]: nan"):
        worst.check()


def test_many_rows_are_compared_as_one_whole() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((333, 8)).astype(np.float32)
    actual = expected + rng.standard_normal((333, 8)).astype(np.float32) * 1e-3
    error = np.abs(actual.astype(np.float64) - expected)
    scale = np.sqrt(np.square(expected.astype(np.float64)).mean())
    difference = compare("decoder", "logits", "packed", expected, actual)
    assert difference.max_error == pytest.approx(error.max() / scale)
    assert difference.mean_error == pytest.approx(error.mean() / scale)
    assert difference.where == np.unravel_index(error.argmax(), error.shape)


def test_another_shape_is_refused() -> None:
    one, other = np.ones((2, 1), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(ParityError, match=r"logits has shape \[1, 2\]; torch gives \[2, 1\]"):
        compare("decoder", "logits", "packed", one, other)


def test_errors_are_relative_to_the_change() -> None:
    before = np.full((100, 4), 10.0, np.float32)
    after = before + 1
    assert relative_error(after, after + 0.1, after - before) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(after, after + 0.1, after) == pytest.approx(0.1 / 11, rel=1e-4)
    assert relative_error(before, before, np.zeros_like(before)) == 0


@pytest.mark.parametrize("error", [SHIPPED_LIMIT * 1.01, float("nan"), float("inf")])
def test_a_broken_layer_is_an_error_that_says_what_to_do(error: float) -> None:
    ShippedError("decoder", "layers.3", SHIPPED_LIMIT, 5.0).check()
    with pytest.raises(ParityError, match=r"^decoder: layers\.3 quantized .*\[\[override\]\]"):
        ShippedError("decoder", "layers.3", error, 0.0).check()
