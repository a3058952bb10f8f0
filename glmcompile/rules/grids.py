"""What a vision encoder's inputs owe to the images' grids alone.

Each rule takes grid_thw int64 [images, 3] (frames, patch rows, patch columns) and gives the arrays
of one function of transformers' `vision_utils`, for patches packed one image after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.rules.interpolation import interpolation_taps

Arrays = tuple[NDArray[Any], ...]


def patch_positions(
    grid_thw: NDArray[np.int64], spatial_merge_size: int, include_temporal: bool = False
) -> Arrays:
    """Row and column of every patch of every frame: int64 [patches, 2], or 3 with the frame first.

    Patches come in the processor's order: windows of merged patches one after another, so that
    the patches merged into one image feature are adjacent.
    """
    merge = spatial_merge_size
    blocks = []
    for frames, rows, columns in grid_thw.tolist():
        grid = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
        places = np.tile(grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (frames, 1))
        if include_temporal:
            frame = np.repeat(np.arange(frames), rows * columns)
            places = np.concatenate([frame[:, None], places], axis=1)
        blocks.append(places)
    axes = 3 if include_temporal else 2
    return (np.concatenate(blocks).astype(np.int64) if blocks else np.empty((0, axes), np.int64),)


def segment_boundaries(grid_thw: NDArray[np.int64], merge_temporal: bool = False) -> Arrays:
    """cu_seqlens int32 [segments + 1]: attention stays inside one frame of one image.

    merge_temporal: inside one image, all its frames together.
    """
    sides = grid_thw[:, 1] * grid_thw[:, 2]
    lengths = sides * grid_thw[:, 0] if merge_temporal else np.repeat(sides, grid_thw[:, 0])
    return (_boundaries(lengths),)


def windows(
    grid_thw: NDArray[np.int64], spatial_merge_size: int, window_size: int, patch_size: int
) -> Arrays:
    """Merged patches in the order of their attention windows, int64 [merged patches], and the
    windows' boundaries in patches, int32 [windows + 1]."""
    side = window_size // spatial_merge_size // patch_size
    order, lengths, first = [], [], 0
    for frames, rows, columns in (grid_thw // [1, spatial_merge_size, spatial_merge_size]).tolist():
        index = first + np.arange(frames * rows * columns).reshape(frames, rows, columns)
        for frame in index:
            for row in range(0, rows, side):
                for column in range(0, columns, side):
                    window = frame[row : row + side, column : column + side]
                    order.append(window.reshape(-1))
                    lengths.append(window.size * spatial_merge_size**2)
        first += index.size
    return np.concatenate(order).astype(np.int64), _boundaries(np.array(lengths))


def position_taps(
    grid_thw: NDArray[np.int64],
    num_grid_per_side: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    spatial_merge_size: int = 1,
    padding: str = "border",
) -> Arrays:
    """Cells int64 and weights float32, both [patches, taps], of a learned square grid of position
    embeddings that make up each patch's."""
    (places,) = patch_positions(grid_thw, spatial_merge_size)
    return interpolation_taps(grid_thw, places, num_grid_per_side, mode, align_corners, padding)


def nearest_positions(target_sizes: NDArray[np.int64], num_patches_per_side: int) -> Arrays:
    """The nearest cell of a learned square grid of position embeddings, int64 [patches].

    target_sizes: rows and columns, int64 [images, 2].
    """
    side = num_patches_per_side
    boundaries = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    found = []
    for rows, columns in target_sizes[:, -2:].tolist():
        row, column = (
            np.searchsorted(boundaries, np.arange(n, dtype=np.float32) / np.float32(n), "right")
            for n in (rows, columns)
        )
        found.append((row[:, None] * side + column).reshape(-1))
    return (np.concatenate(found).astype(np.int64),)


def _boundaries(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


GRID_RULES: dict[str, Callable[..., Arrays]] = {
    "patch_positions": patch_positions,
    "segment_boundaries": segment_boundaries,
    "windows": windows,
    "position_taps": position_taps,
    "nearest_positions": nearest_positions,
}
