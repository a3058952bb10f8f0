"""What the component graphs are fed: one place that knows their inputs' names and layouts.

The model runner alone fills buffers of its own, which stay bound from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ModelConfig
from glmcompile.families import Family

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stretch:
    """Tokens start..end of a sequence, to be run in one call.

    positions: int64 [axes, T] of the whole sequence; blocks: its blocks of the cache, int32.
    """

    start: int
    end: int
    positions: NDArray[np.int64]
    blocks: NDArray[np.int32]


def vision_feeds(family: Family, model: ModelConfig, grids: NDArray[np.int64]) -> Feeds:
    """Inputs of the vision encoder but `pixel_values`, for images packed one after the other.

    grids: int64 [images, 3].
    """
    assert family.vision_inputs is not None and model.vision is not None
    return family.vision_inputs(grids, model.vision)


def embedding_feeds(
    model: ModelConfig, ids: NDArray[np.int64], features: NDArray[np.float32] | None = None
) -> Feeds:
    """Inputs of the embedding. features: [image tokens of `ids`, hidden]; None without images."""
    if model.vision is None:
        return {"input_ids": ids}
    if features is None:
        features = np.empty((0, model.hidden_size), np.float32)
    indices = np.flatnonzero(ids == model.image_token_id).astype(np.int64)
    return {"input_ids": ids, "image_features": features, "image_token_indices": indices}


def decoder_feeds(
    model: ModelConfig,
    stretches: Sequence[Stretch],
    rows: NDArray[np.int64] | None = None,
) -> Feeds:
    """Inputs of the decoder but embeddings and caches, the stretches packed in their order.

    rows: of the packed tokens those whose logits are wanted, all by default.
    """
    counts = np.array([each.end - each.start for each in stretches], np.int64)
    positions = np.concatenate([each.positions[:, each.start : each.end] for each in stretches], 1)
    table = np.full((len(stretches), max(len(each.blocks) for each in stretches)), -1, np.int32)
    for row, each in enumerate(stretches):
        table[row, : len(each.blocks)] = each.blocks
    return {
        "position_ids": positions if model.position_axes > 1 else positions[0],
        "cumulative_sequence_length": np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        "past_seqlens": np.array([each.start for each in stretches], np.int32),
        "block_table": table,
        "logits_indices": np.arange(counts.sum(), dtype=np.int64) if rows is None else rows,
    }


def is_cache(name: str) -> bool:
    """Whether a decoder's input is a layer's pool of keys or values."""
    return "_cache." in name
