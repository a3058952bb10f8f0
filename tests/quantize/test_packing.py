"""The packed weight layout: where each weight goes, padding, and the swiglu interleave."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmcompile.quantize.packing import (
    interleave_gate_up,
    pack_weight,
    packed_shape,
    unpack_weight,
    weight_sum,
)


@given(n=st.integers(1, 70), k=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_every_weight_is_where_the_formula_says_and_the_rest_is_zero(
    n: int, k: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).integers(-128, 128, (n, k), dtype=np.int8)
    packed = pack_weight(weight)
    assert packed.shape == packed_shape(n, k)
    assert packed.flags.c_contiguous
    i, j = np.indices((n, k))
    np.testing.assert_array_equal(packed[i // 16, j // 64, j % 64 // 4, i % 16, j % 4], weight)
    assert np.count_nonzero(packed) == np.count_nonzero(weight)
    np.testing.assert_array_equal(unpack_weight(packed, n, k), weight)


def test_weight_sum_is_exact_in_int32() -> None:
    weight = np.full((2, 65536), -128, np.int8)
    np.testing.assert_array_equal(weight_sum(weight), np.full(2, -128 * 65536, np.int32))
    assert weight_sum(weight).dtype == np.int32


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((2, 2), np.int32),
        np.zeros(4, np.int8),
        np.zeros((0, 4), np.int8),
        np.zeros((1, 65537), np.int8),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        pack_weight(weight)


def test_unpacking_checks_the_shape() -> None:
    with pytest.raises(ValueError, match=r"expected packed shape \(2, 1, 16, 16, 4\)"):
        unpack_weight(np.zeros((1, 1, 16, 16, 4), np.int8), 17, 64)


@pytest.mark.parametrize("trailing", [(), (5,)])
def test_gate_and_up_alternate_in_blocks_of_16(trailing: tuple[int, ...]) -> None:
    gate = np.arange(32 * 5).reshape(32, 5) if trailing else np.arange(32)
    both = interleave_gate_up(gate, -gate)
    np.testing.assert_array_equal(both[:16], gate[:16])
    np.testing.assert_array_equal(both[16:32], -gate[:16])
    np.testing.assert_array_equal(both[32:48], gate[16:])
    np.testing.assert_array_equal(both[48:], -gate[16:])


@pytest.mark.parametrize("shapes", [((32,), (16,)), ((24,), (24,)), ((), ())])
def test_gate_and_up_must_pair_up(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        interleave_gate_up(np.zeros(shapes[0]), np.zeros(shapes[1]))
