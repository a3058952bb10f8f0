"""Confidence intervals for shares of correct answers, and for the difference of two paired ones.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA
22 (1927), 209-212; R. G. Newcombe, "Improved confidence intervals for the difference between
binomial proportions based on paired data", Statistics in Medicine 17 (1998), 2635-2650, method 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

CONFIDENCE = 0.95
METHOD = "Newcombe 1998, method 10"
_Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, count: int) -> Interval:
    """The score interval of a share. Raises ValueError without observations."""
    if count < 1:
        raise ValueError("an interval needs at least one observation")
    share = successes / count
    z2 = _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(candidate: Sequence[bool], baseline: Sequence[bool]) -> Interval:
    """Share correct of `candidate` minus that of `baseline`, answers to the same questions.

    The two Wilson intervals are combined with the correlation of the pairs, so questions that both
    get right or both get wrong narrow the interval, as they should; it is never empty, even if no
    pair differs. Raises ValueError without observations or for different lengths.
    """
    pairs = list(zip(candidate, baseline, strict=True))
    count = len(pairs)
    both = sum(a and b for a, b in pairs)
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    neither = count - both - only_first - only_second
    first = wilson(both + only_first, count)
    second = wilson(both + only_second, count)
    correlation = _phi(both, only_first, only_second, neither)
    difference = first.value - second.value
    down, up = first.value - first.low, first.high - first.value
    down_second, up_second = second.value - second.low, second.high - second.value
    below = sqrt(max(0.0, down**2 - 2 * correlation * down * up_second + up_second**2))
    above = sqrt(max(0.0, up**2 - 2 * correlation * up * down_second + down_second**2))
    return Interval(difference, difference - below, difference + above)


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """The pairs' correlation; a positive one is corrected for continuity (method 10)."""
    rows = (both + only_first) * (only_second + neither)
    columns = (both + only_second) * (only_first + neither)
    if rows == 0 or columns == 0:
        return 0.0
    product = both * neither - only_first * only_second
    count = both + only_first + only_second + neither
    corrected = max(product - count / 2, 0.0) if product > 0 else float(product)
    return corrected / sqrt(rows * columns)
