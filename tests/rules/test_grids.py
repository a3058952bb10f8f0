"""What vision encoders owe to the grids equals transformers' vision_utils."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import vision_utils
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionEmbeddings

from glmcompile.rules import GRID_RULES
from tests.checkpoints import CONFIGS

GRIDS = [
    [(1, 4, 6)],
    [(1, 2, 2), (3, 4, 8), (1, 6, 2)],
    [(1, 2, 2), (2, 40, 30), (1, 12, 10)],
]
Grids = list[tuple[int, int, int]]
every_grid = pytest.mark.parametrize("grids", GRIDS, ids=str)


def computed(rule: str, grids: Any, **arguments: Any) -> tuple[np.ndarray, ...]:
    return GRID_RULES[rule](np.array(grids, np.int64), **arguments)


def assert_equal(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype == expected.numpy().dtype


@every_grid
@pytest.mark.parametrize("include_temporal", [False, True])
@pytest.mark.parametrize("merge", [1, 2])
def test_patch_positions_equal_transformers(
    grids: Grids, merge: int, include_temporal: bool
) -> None:
    (found,) = computed(
        "patch_positions", grids, spatial_merge_size=merge, include_temporal=include_temporal
    )
    assert_equal(
        found, vision_utils.get_vision_position_ids(torch.tensor(grids), merge, include_temporal)
    )


@every_grid
@pytest.mark.parametrize("merge_temporal", [False, True])
def test_segments_equal_transformers(grids: Grids, merge_temporal: bool) -> None:
    (found,) = computed("segment_boundaries", grids, merge_temporal=merge_temporal)
    assert_equal(found, vision_utils.get_vision_cu_seqlens(torch.tensor(grids), merge_temporal))


@every_grid
@pytest.mark.parametrize("window_size", [56, 112])
def test_windows_equal_transformers(grids: Grids, window_size: int) -> None:
    arguments = {"spatial_merge_size": 2, "window_size": window_size, "patch_size": 14}
    found = computed("windows", grids, **arguments)
    expected = vision_utils.get_vision_window_index(torch.tensor(grids), **arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


@every_grid
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_position_taps_equal_transformers(
    grids: Grids, mode: str, align_corners: bool, padding: str, merge: int
) -> None:
    """Compared as what they weigh: where a point lies on a cell, either neighbour may be a tap."""
    arguments: dict[str, Any] = {
        "num_grid_per_side": 7,
        "mode": mode,
        "align_corners": align_corners,
        "spatial_merge_size": merge,
        "padding": padding,
    }
    cells, weights = computed("position_taps", grids, **arguments)
    theirs = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), **arguments
    )
    assert cells.shape == weights.shape == theirs[0].shape
    assert (cells.dtype, weights.dtype) == (np.int64, np.float32)
    assert cells.min() >= 0
    assert cells.max() < 49
    found = weights_of_cells(cells, weights, 49)
    expected = weights_of_cells(*(each.numpy() for each in theirs), 49)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def weights_of_cells(cells: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The weight of every cell for each patch: float64 [patches, count]."""
    found = np.zeros((len(cells), count))
    np.add.at(found, (np.arange(len(cells))[:, None], cells), weights)
    return found


@pytest.mark.parametrize("sizes", [[(4, 6)], [(14, 9), (1, 1), (31, 70)]], ids=str)
@pytest.mark.parametrize("side", [6, 14])
def test_nearest_positions_equal_transformers(sizes: list[tuple[int, int]], side: int) -> None:
    (found,) = computed("nearest_positions", sizes, num_patches_per_side=side)
    assert_equal(found, vision_utils.get_vision_nearest_position_ids(torch.tensor(sizes), side))


@every_grid
def test_bicubic_taps_are_what_glm4v_samples(grids: Grids) -> None:
    positions, boundaries = (
        torch.from_numpy(computed(rule, grids, **arguments)[0])
        for rule, arguments in (
            ("patch_positions", {"spatial_merge_size": 2}),
            ("segment_boundaries", {}),
        )
    )
    embeddings = Glm4vVisionEmbeddings(CONFIGS["glm4v"]().vision_config)
    table = embeddings.position_embedding.weight
    frames = torch.tensor([(1, rows, columns) for t, rows, columns in grids for _ in range(t)])
    expected = embeddings(
        torch.zeros(len(positions), table.shape[1]), boundaries.diff(), frames, *positions.T
    )
    cells, weights = (
        torch.from_numpy(each)
        for each in computed(
            "position_taps", grids, num_grid_per_side=6, mode="bicubic", spatial_merge_size=2
        )
    )
    actual = torch.nn.functional.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
