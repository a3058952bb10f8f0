"""Resampling of a learned grid of position embeddings, as cells and weights.

The bicubic kernel: Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981; with
torch's coefficient, as its `interpolate` and `grid_sample` apply it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CUBIC_A = -0.75
TAPS = {"bilinear": 2, "bicubic": 4}  # neighbours on each axis


def interpolation_taps(
    grid_thw: NDArray[np.int64],
    positions: NDArray[np.int64],
    side: int,
    mode: str = "bicubic",
    align_corners: bool = False,
    padding: str = "border",
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cells int64 and weights float32, both [patches, taps], that make up each patch's embedding.

    positions: row and column of each patch in its frame, int64 [patches, 2]. side: of the grid that
    is stretched over every frame; its cells are counted row by row. mode: "bilinear" (4 taps) or
    "bicubic" (16). padding: what cells beyond the border count as: "border" or "zeros".
    """
    taps = TAPS[mode]
    cells = np.empty((len(positions), taps, taps), np.int64)
    weights = np.empty(cells.shape, np.float32)
    start = 0
    for frames, rows, columns in grid_thw.tolist():
        image = slice(start, start + frames * rows * columns)
        row, column = positions[image].T
        row_cells, row_weights = _axis_taps(rows, side, mode, align_corners, padding)
        column_cells, column_weights = _axis_taps(columns, side, mode, align_corners, padding)
        cells[image] = side * row_cells[row, :, None] + column_cells[column, None]
        weights[image] = row_weights[row, :, None] * column_weights[column, None]
        start = image.stop
    return cells.reshape(-1, taps**2), weights.reshape(-1, taps**2)


@lru_cache(maxsize=64)  # a screen's size seldom changes
def _axis_taps(
    count: int, side: int, mode: str, align_corners: bool, padding: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cells around each of `count` points spread over an axis of `side` cells, and weights."""
    if align_corners:
        points = np.arange(count) * ((side - 1) / max(count - 1, 1))
    else:
        points = (np.arange(count) + 0.5) * (side / count) - 0.5
    around = np.arange(-1, 3) if mode == "bicubic" else np.arange(2)
    cells = np.floor(points)[:, None] + around
    distance = np.abs(points[:, None] - cells)
    if mode == "bicubic":
        near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
        far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
        weights = np.where(distance <= 1, near, far)
    else:
        weights = np.maximum(1 - distance, 0)
    if padding == "zeros":
        weights = weights * ((cells >= 0) & (cells < side))
    return np.clip(cells, 0, side - 1).astype(np.int64), weights.astype(np.float32)
