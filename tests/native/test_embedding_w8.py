"""EmbeddingW8 gathers rows of the packed matrix that the output head uses too."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from glmcompile.quantize.packing import pack_weight
from tests.native.linear_reference import one_node_session

ERRORS = (Fail, InvalidArgument, RuntimeException)


def gather(ids: np.ndarray, weight: np.ndarray, scale: np.ndarray, vocabulary: int) -> np.ndarray:
    """`weight` is unpacked; its rows may differ in number from the declared vocabulary."""
    feed = {"ids": ids, "weight": pack_weight(weight), "weight_scale": scale}
    attributes = {"in_features": weight.shape[1], "out_features": vocabulary}
    return one_node_session("EmbeddingW8", feed, {}, attributes).run(None, feed)[0]


@pytest.mark.parametrize(("vocabulary", "hidden"), [(100, 64), (37, 70), (1, 3), (16, 576)])
@pytest.mark.parametrize("shape", [(0,), (1,), (300,), (2, 5)])
def test_rows_are_exact(vocabulary: int, hidden: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(vocabulary)
    weight = rng.integers(-128, 128, (vocabulary, hidden), dtype=np.int8)
    scale = rng.uniform(0.01, 1, vocabulary).astype(np.float32)
    ids = rng.integers(0, vocabulary, shape)
    expected = weight[ids].astype(np.float32) * scale[ids][..., None]
    np.testing.assert_array_equal(gather(ids, weight, scale, vocabulary), expected)


@pytest.mark.parametrize("bad", [-1, 37, 2**40])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(ERRORS, match=f"ids: expected 0 to 36, got {bad} at position 2"):
        gather(np.array([0, 36, bad]), np.zeros((37, 8), np.int8), np.ones(37, np.float32), 37)


def test_malformed_weights_are_named() -> None:
    weight, ids = np.zeros((37, 8), np.int8), np.array([0])
    with pytest.raises(ERRORS, match=r"weight_scale: expected \[37\], got \[36\]"):
        gather(ids, weight, np.ones(36, np.float32), 37)
    with pytest.raises(ERRORS, match=r"weight: expected \[4, 1, 16, 16, 4\]"):
        gather(ids, weight, np.ones(49, np.float32), 49)
