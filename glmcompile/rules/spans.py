"""Ranges of a prompt whose tokens see each other, not only those before them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from glmcompile.contract import Contract

Ranges = list[tuple[int, int]]


def image_runs(ids: NDArray[np.int64], image_token_id: int | None) -> Ranges:
    """Each run of image tokens, as Gemma 3's."""
    is_image = np.concatenate([[False], ids == image_token_id, [False]])
    edges = np.flatnonzero(is_image[1:] != is_image[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def whole_prompt(ids: NDArray[np.int64], image_token_id: int | None) -> Ranges:
    """The prompt, images and text, as PaliGemma's prefix."""
    return [(0, len(ids))]


SPAN_RULES: dict[str, Callable[[NDArray[np.int64], int | None], Ranges]] = {
    "image_runs": image_runs,
    "whole_prompt": whole_prompt,
}


def attended_spans(contract: Contract, prompt: NDArray[np.int64]) -> Ranges:
    """First and end of each range of a prompt's tokens that see each other."""
    if contract.spans is None:
        return []
    return SPAN_RULES[contract.spans](prompt, contract.image_token_id)


def span_rows(spans: Ranges, start: int, end: int) -> NDArray[np.int32]:
    """Of tokens start..end the first and the end of their span, int32 [end - start, 2]; a token in
    none has its own place twice."""
    rows = np.repeat(np.arange(start, end, dtype=np.int32)[:, None], 2, axis=1)
    for first, last in spans:
        rows[max(first - start, 0) : max(last - start, 0)] = first, last
    return rows
