"""Intervals against figures published with the methods."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from glmcompile.evaluate.intervals import paired_difference, wilson


def answers(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Paired outcomes with these counts: right in both, in one only, in none."""
    return (
        [True] * (both + first) + [False] * (second + neither),
        [True] * both + [False] * first + [True] * second + [False] * neither,
    )


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, count: int, low: float, high: float
) -> None:
    interval = wilson(successes, count)
    assert interval.value == successes / count
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_no_observations_give_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_paired_difference_gives_the_published_interval() -> None:
    # Newcombe, "... based on paired data", 1998: 36, 12, 2, 0 by method 10.
    interval = paired_difference(*answers(36, 12, 2, 0))
    assert interval.value == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.0569, abs=5e-5)
    assert interval.high == pytest.approx(0.3404, abs=5e-5)


def test_exchanging_the_models_mirrors_the_interval() -> None:
    first, second = answers(30, 9, 4, 7)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)
    assert there.high == pytest.approx(-back.low)


@pytest.mark.parametrize("counts", [(54, 0, 0, 0), (0, 0, 0, 54), (30, 0, 0, 24)])
def test_equal_answers_leave_an_uncertain_difference_around_zero(counts: Sequence[int]) -> None:
    interval = paired_difference(*answers(*counts))
    assert interval.value == 0
    assert -0.1 < interval.low < 0 < interval.high < 0.1


def test_pairs_that_agree_narrow_the_interval() -> None:
    # The same shares, 60 of 100 and 50 of 100: once mostly the same questions, once not.
    same = paired_difference(*answers(48, 12, 2, 38))
    different = paired_difference(*answers(20, 40, 30, 10))
    assert same.value == pytest.approx(different.value)
    assert same.high - same.low < 0.6 * (different.high - different.low)
