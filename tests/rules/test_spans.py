"""Ranges of a prompt whose tokens see each other."""

from __future__ import annotations

import numpy as np
import pytest

from glmcompile.rules import SPAN_RULES, attended_spans, span_rows
from tests.contracts import image_contract, text_contract

IMAGE = 9


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3], []),
        ([1, IMAGE, IMAGE, 2], [(1, 3)]),
        ([IMAGE, 1, IMAGE, IMAGE], [(0, 1), (2, 4)]),
        ([], []),
    ],
    ids=str,
)
def test_each_run_of_image_tokens_is_a_range(
    ids: list[int], expected: list[tuple[int, int]]
) -> None:
    assert SPAN_RULES["image_runs"](np.array(ids, np.int64), IMAGE) == expected


def test_a_prefix_is_the_whole_prompt() -> None:
    assert SPAN_RULES["whole_prompt"](np.array([1, IMAGE, 2]), IMAGE) == [(0, 3)]


def test_ranges_follow_from_the_contract() -> None:
    ids = np.array([1, IMAGE, IMAGE, 2])
    assert attended_spans(image_contract(spans="image_runs"), ids) == [(1, 3)]
    assert attended_spans(image_contract(spans="whole_prompt"), ids) == [(0, 4)]
    assert attended_spans(text_contract(), ids) == []


@pytest.mark.parametrize(("start", "end"), [(0, 9), (3, 5), (6, 9), (0, 3), (4, 8)])
def test_rows_name_the_range_of_each_token(start: int, end: int) -> None:
    spans = [(2, 5), (5, 7)]
    rows = span_rows(spans, start, end)
    assert (rows.dtype, rows.shape) == (np.int32, (end - start, 2))
    for token, (first, last) in zip(range(start, end), rows.tolist(), strict=True):
        own = next((each for each in spans if each[0] <= token < each[1]), (token, token))
        assert (first, last) == own
