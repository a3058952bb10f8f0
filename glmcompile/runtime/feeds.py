"""What the component graphs are fed: one place that lays out a batch, bound by the ports' roles.

The model runner alone fills buffers of its own, which stay bound from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glmcompile.contract import (
    BLOCK_TABLE,
    FEATURE_ROWS,
    FEATURES,
    IMAGE_SPANS,
    LOGITS_ROWS,
    PAST_LENGTHS,
    POSITIONS,
    PROCESSED,
    SEQUENCE_ENDS,
    STATE_SLOTS,
    TOKEN_IDS,
    Contract,
    VisionContract,
)
from glmcompile.rules import GRID_RULES, attended_spans, span_rows

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stretch:
    """Tokens start..end of a sequence, to be run in one call.

    token_ids: int64 [T] and positions: int64 [axes, T] of the whole sequence; blocks: its blocks of
    the cache, int32; features: of all its image tokens, float32 [image tokens, width].
    """

    start: int
    end: int
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    blocks: NDArray[np.int32]
    features: NDArray[np.float32] | None = None


class Processed(Protocol):
    """What is asked of a processed image, see runtime.image_processor.ProcessedImage."""

    @property
    def grid_thw(self) -> tuple[int, ...]: ...

    @property
    def inputs(self) -> dict[str, NDArray[Any]]: ...


def vision_feeds(model: Contract, image: Processed) -> Feeds:
    """Inputs of the vision encoder for one image."""
    assert model.vision is not None
    inputs = image.inputs
    given = {port.name: inputs[port.name] for port in model.encoder.having(PROCESSED)}
    return given | grid_feeds(model.vision, np.array([image.grid_thw], np.int64))


def grid_feeds(vision: VisionContract, grids: NDArray[np.int64]) -> Feeds:
    """Inputs of the vision encoder that follow from the images' grids, int64 [images, 3]."""
    return {
        name: array
        for each in vision.computed
        for name, array in zip(
            each.outputs, GRID_RULES[each.rule.name](grids, **each.rule.arguments), strict=True
        )
    }


def decoder_feeds(
    model: Contract,
    stretches: Sequence[Stretch],
    rows: NDArray[np.int64] | None = None,
    slots: NDArray[np.int32] | None = None,
) -> Feeds:
    """Inputs of the decoder but the caches, the stretches packed in their order.

    rows: of the packed tokens those whose logits are wanted, all by default. slots: of each
    stretch's sequence in the states' pools, int32; their numbers by default.
    """
    counts = np.array([each.end - each.start for each in stretches], np.int64)
    ids = np.concatenate([each.token_ids[each.start : each.end] for each in stretches])
    positions = np.concatenate([each.positions[:, each.start : each.end] for each in stretches], 1)
    table = np.full((len(stretches), max(len(each.blocks) for each in stretches)), -1, np.int32)
    for row, each in enumerate(stretches):
        table[row, : len(each.blocks)] = each.blocks
    by_role: dict[str, NDArray[Any]] = {
        TOKEN_IDS: ids,
        POSITIONS: positions if model.position_axes > 1 else positions[0],
        SEQUENCE_ENDS: np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        PAST_LENGTHS: np.array([each.start for each in stretches], np.int32),
        BLOCK_TABLE: table,
        STATE_SLOTS: np.arange(len(stretches), dtype=np.int32) if slots is None else slots,
        LOGITS_ROWS: np.arange(counts.sum(), dtype=np.int64) if rows is None else rows,
    }
    if (port := model.decoder.input(FEATURES)) is not None:
        none = np.empty((0, int(port.shape[-1])), np.float32)
        parts = [_features(model, each) for each in stretches]
        by_role[FEATURES] = np.concatenate([none, *(part for part in parts if part is not None)])
        by_role[FEATURE_ROWS] = np.flatnonzero(ids == model.image_token_id).astype(np.int64)
    if model.decoder.input(IMAGE_SPANS) is not None:
        rows_of = [
            span_rows(attended_spans(model, each.token_ids), each.start, each.end)
            for each in stretches
        ]
        by_role[IMAGE_SPANS] = np.concatenate(rows_of)
    return {port.name: by_role[port.role] for port in model.decoder.inputs if port.role in by_role}


def _features(model: Contract, stretch: Stretch) -> NDArray[np.float32] | None:
    """Of a stretch's image tokens; None for a sequence without images."""
    if stretch.features is None:
        return None
    is_image = stretch.token_ids == model.image_token_id
    before, within = (
        int(is_image[part].sum())
        for part in (slice(stretch.start), slice(stretch.start, stretch.end))
    )
    return stretch.features[before : before + within]
