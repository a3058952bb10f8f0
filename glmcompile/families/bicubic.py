"""Bicubic resampling of a learned grid of position embeddings, as cells and weights.

The kernel: Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981; with torch's
coefficient, as its `grid_sample` with align_corners=False and padding_mode="border" applies it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CUBIC_A = -0.75
TAPS = 16  # 4 neighbours on each axis


def patch_taps(
    grid_thw: NDArray[np.int64], positions: NDArray[np.int64], side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cells int64 and weights float32, both [patches, 16], that make up each patch's embedding.

    positions: row and column of each patch in its frame, int64 [patches, 2]. side: of the grid that
    is stretched over every frame; its cells are counted row by row.
    """
    cells = np.empty((len(positions), 4, 4), np.int64)
    weights = np.empty(cells.shape, np.float32)
    start = 0
    for frames, rows, columns in grid_thw.tolist():
        image = slice(start, start + frames * rows * columns)
        row, column = positions[image].T
        row_cells, row_weights = _axis_taps(rows, side)
        column_cells, column_weights = _axis_taps(columns, side)
        cells[image] = side * row_cells[row, :, None] + column_cells[column, None]
        weights[image] = row_weights[row, :, None] * column_weights[column, None]
        start = image.stop
    return cells.reshape(-1, TAPS), weights.reshape(-1, TAPS)


@lru_cache(maxsize=64)  # a screen's size seldom changes
def _axis_taps(count: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The 4 cells around each of `count` points spread over an axis of `side` cells, and weights.

    Cells beyond the border count as the border cell.
    """
    points = (np.arange(count) + 0.5) * (side / count) - 0.5
    cells = np.floor(points)[:, None] + np.arange(-1, 3)
    distance = np.abs(points[:, None] - cells)
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance <= 1, near, far).astype(np.float32)
    return np.clip(cells, 0, side - 1).astype(np.int64), weights
