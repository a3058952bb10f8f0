"""The calls of a component that a compile makes: packed, in chunks, and one a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.samples import Sample, packed_images, position_ids_of
from glmcompile.runtime.feeds import (
    Feeds,
    Stretch,
    decoder_feeds,
    embedding_feeds,
    vision_feeds,
)

BLOCK_SIZE = 32
# Where the chunked check cuts each sequence: a step boundary in the middle of an image is fine.
CHUNKS = (7, 40)
# A calibration sample's rows, evenly spread, that the last layer and lm_head see.
LOGITS_ROWS = 256

VISION, EMBEDDING, DECODER = "vision_encoder", "embedding", "decoder"
OUTPUTS = {VISION: "image_features", EMBEDDING: "inputs_embeds", DECODER: "logits"}
# The call that has all compared samples at once.
PACKED = "packed"
# The call, among the reference's values, whose outputs torch computed.
TORCH = "torch"


@dataclass(frozen=True)
class Call:
    """One run of a component's graph.

    feeds: every input but the caches, and `pixel_values` where these are made when wanted.
    caches: calls of the same name share their caches, which the first of them finds empty.
    blocks: how many blocks the caches have; 0 outside the decoder.
    rows: of the compared samples' packed tokens those that this call computes, None for all.
    """

    name: str
    feeds: Feeds
    caches: str = ""
    blocks: int = 0
    rows: NDArray[np.int64] | None = None
    pixel_values: Callable[[], NDArray[np.float32]] | None = None

    def given(self, name: str) -> NDArray[Any] | None:
        """An input by its name; None for one that comes from another layer."""
        if name == "pixel_values" and self.pixel_values is not None:
            return self.pixel_values()
        return self.feeds.get(name)

    def expected(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What torch computed for this call's tokens, of the values of all tokens [T, channels]."""
        return values if self.rows is None else values[self.rows]


def compared_calls(
    checkpoint: Checkpoint, component: str, samples: Sequence[Sample], torch: Activations
) -> list[Call]:
    """Calls on torch's outputs of the component before, so that an error stays where it arises.

    All samples are packed in one call. The decoder also takes them in chunks over a paged cache,
    whose blocks are handed out in a shuffled order.
    """
    model, family = checkpoint.model, checkpoint.family
    if component == VISION:
        pixels, grids = packed_images(samples)
        feeds = vision_feeds(family, model, grids)
        return [Call(PACKED, {"pixel_values": pixels, **feeds})]
    if component == EMBEDDING:
        ids = np.concatenate([each.token_ids for each in samples])
        features = torch.read(TORCH, OUTPUTS[VISION]) if model.vision is not None else None
        return [Call(PACKED, embedding_feeds(model, ids, features))]
    lengths = [len(each.token_ids) for each in samples]
    calls = []
    for name, cuts in ((PACKED, (max(lengths),)), ("chunk", CHUNKS)):
        calls += _decoder_calls(checkpoint, name, samples, cuts, torch)
    return calls


def _decoder_calls(
    checkpoint: Checkpoint,
    name: str,
    samples: Sequence[Sample],
    cuts: Sequence[int],
    torch: Activations,
) -> list[Call]:
    """The samples packed together, prefilled up to each cut in turn."""
    embeds = torch.read(TORCH, OUTPUTS[EMBEDDING])
    lengths = [len(each.token_ids) for each in samples]
    starts = np.cumsum([0, *lengths])
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    shuffled = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    blocks = np.split(shuffled, np.cumsum(needed)[:-1])
    positions = [position_ids_of(checkpoint, each) for each in samples]
    calls, done = [], 0
    for number, end in enumerate((*cuts, max(lengths))):
        active = [index for index, length in enumerate(lengths) if length > done < end]
        if not active:
            continue
        stretches = [
            Stretch(done, min(end, lengths[index]), positions[index], blocks[index])
            for index in active
        ]
        rows = np.concatenate(
            [
                np.arange(starts[index] + each.start, starts[index] + each.end)
                for index, each in zip(active, stretches, strict=True)
            ]
        )
        feeds = decoder_feeds(checkpoint.model, stretches)
        feeds["inputs_embeds"] = embeds[rows]
        label = name if len(cuts) == 1 else f"{name}{number}"
        calls.append(Call(label, feeds, name, len(shuffled), rows))
        done = end
    return calls


def calibration_calls(
    checkpoint: Checkpoint, component: str, samples: Sequence[Sample], before: Activations | None
) -> list[Call]:
    """One call a sample. before: what the component before gave, by the names of the same calls."""
    model, family = checkpoint.model, checkpoint.family
    calls = []
    for number, sample in enumerate(samples):
        name = f"sample{number}"
        if component == VISION:
            if sample.images:
                feeds = vision_feeds(family, model, sample.grid_thw)
                calls.append(Call(name, feeds, pixel_values=sample.pixel_values))
            continue
        if component == EMBEDDING:
            features = None
            if sample.images:
                assert before is not None
                features = before.read(name, OUTPUTS[VISION])
            calls.append(Call(name, embedding_feeds(model, sample.token_ids, features)))
            continue
        assert before is not None
        length = len(sample.token_ids)
        positions = position_ids_of(checkpoint, sample)
        blocks = np.arange(-(-length // BLOCK_SIZE), dtype=np.int32)
        feeds = decoder_feeds(
            model,
            [Stretch(0, length, positions, blocks)],
            np.unique(np.linspace(0, length - 1, min(length, LOGITS_ROWS)).astype(np.int64)),
        )
        feeds["inputs_embeds"] = before.read(name, OUTPUTS[EMBEDDING])
        calls.append(Call(name, feeds, name, len(blocks)))
    return calls
