"""The calls of a component that a compile makes: packed, in chunks, and one a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.samples import ImageInputs, Sample, position_ids_of, units_of
from glmcompile.contract import DECODER, PROCESSED, VISION
from glmcompile.rules import attended_spans
from glmcompile.runtime.feeds import Feeds, Stretch, decoder_feeds, grid_feeds

BLOCK_SIZE = 32
# Where the chunked check cuts each sequence: a step boundary in the middle of an image is fine.
CHUNKS = (7, 40)
# A calibration sample's rows, evenly spread, that the last layer and lm_head see.
LOGITS_ROWS = 256

OUTPUTS = {VISION: "image_features", DECODER: "logits"}
# The call that has all compared samples at once.
PACKED = "packed"
# The call, among the reference's values, whose outputs torch computed.
TORCH = "torch"


@dataclass(frozen=True)
class Call:
    """One run of a component's graph.

    feeds: every input but the caches, and the image's arrays where these are made when wanted.
    caches: calls of the same name share their caches, which the first of them finds empty.
    blocks: how many blocks the caches have, slots: how many sequences have a state; 0 outside the
        decoder.
    rows: of the compared samples' packed tokens those that this call computes, None for all.
    share: of the compared images those that lie before this call's, its own and all, in units that
        a value's rows are proportional to; None for all.
    image: what the image processor made; processed: names of the inputs that are its arrays.
    """

    name: str
    feeds: Feeds
    caches: str = ""
    blocks: int = 0
    slots: int = 0
    rows: NDArray[np.int64] | None = None
    share: tuple[int, int, int] | None = None
    image: ImageInputs | None = None
    processed: frozenset[str] = frozenset()

    def given(self, name: str) -> NDArray[Any] | None:
        """An input by its name; None for one that comes from another layer."""
        if self.image is not None and name in self.processed:
            return self.image.inputs[name]
        return self.feeds.get(name)

    def expected(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What torch computed for this call, of the values of all tokens or images."""
        if self.share is not None:
            before, own, every = self.share
            start, end = (len(values) * edge // every for edge in (before, before + own))
            return values[start:end]
        return values if self.rows is None else values[self.rows]

    @property
    def is_packed(self) -> bool:
        """Whether it is one of those that have the compared samples at once."""
        return self.name.split(".")[0] == PACKED


def compared_calls(
    checkpoint: Checkpoint, component: str, samples: Sequence[Sample], torch: Activations
) -> list[Call]:
    """Calls on torch's outputs of the component before, so that an error stays where it arises.

    Each image is a call of its own, as in an engine. The decoder takes all samples packed in one
    call, and in chunks over a paged cache, whose blocks are handed out in a shuffled order.
    """
    if component == VISION:
        return _vision_calls(checkpoint, PACKED, [i for each in samples for i in each.images])
    lengths = [len(each.token_ids) for each in samples]
    calls = []
    for name, cuts in ((PACKED, (max(lengths),)), ("chunk", CHUNKS)):
        calls += _decoder_calls(checkpoint, name, samples, cuts, torch)
    return calls


def _vision_calls(checkpoint: Checkpoint, name: str, images: Sequence[ImageInputs]) -> list[Call]:
    vision = checkpoint.model.vision
    assert vision is not None
    sizes = [units_of(checkpoint, image) for image in images]
    processed = frozenset(port.name for port in checkpoint.model.encoder.having(PROCESSED))
    return [
        Call(
            f"{name}.{number}",
            grid_feeds(vision, np.array([image.grid_thw], np.int64)),
            share=(sum(sizes[:number]), sizes[number], sum(sizes)),
            image=image,
            processed=processed,
        )
        for number, image in enumerate(images)
    ]


def _decoder_calls(
    checkpoint: Checkpoint,
    name: str,
    samples: Sequence[Sample],
    cuts: Sequence[int],
    torch: Activations,
) -> list[Call]:
    """The samples packed together, prefilled up to each cut in turn."""
    lengths = [len(each.token_ids) for each in samples]
    starts = np.cumsum([0, *lengths])
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    shuffled = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    blocks = np.split(shuffled, np.cumsum(needed)[:-1])
    positions = [position_ids_of(checkpoint, each) for each in samples]
    features = _features_of(samples, torch)
    whole = [attended_spans(checkpoint.model, each.token_ids) for each in samples]
    calls: list[Call] = []
    done = 0
    for number, cut in enumerate((*cuts, max(lengths))):
        end = _uncut(cut, [span for spans in whole for span in spans])
        active = [index for index, length in enumerate(lengths) if length > done < end]
        if not active:
            continue
        stretches = [
            Stretch(
                done,
                min(end, lengths[index]),
                samples[index].token_ids,
                positions[index],
                blocks[index],
                features[index],
            )
            for index in active
        ]
        rows = np.concatenate(
            [
                np.arange(starts[index] + each.start, starts[index] + each.end)
                for index, each in zip(active, stretches, strict=True)
            ]
        )
        label = name if len(cuts) == 1 else f"{name}{number}"
        feeds = decoder_feeds(checkpoint.model, stretches, slots=np.array(active, np.int32))
        calls.append(Call(label, feeds, name, len(shuffled), len(samples), rows))
        done = end
    return calls


def _uncut(cut: int, spans: Sequence[tuple[int, int]]) -> int:
    """The first place from `cut` on that lies in none of the ranges that are computed whole."""
    while any(start < cut < end for start, end in spans):
        cut = max(end for start, end in spans if start < cut < end)
    return cut


def _features_of(samples: Sequence[Sample], torch: Activations) -> list[NDArray[np.float32] | None]:
    """What torch's vision encoder gave for each sample's images; None without any."""
    if not any(each.images for each in samples):
        return [None] * len(samples)
    features = torch.read(TORCH, OUTPUTS[VISION])
    ends = np.cumsum([sum(image.num_tokens for image in each.images) for each in samples])
    parts = np.split(features, ends[:-1])
    return [part if each.images else None for each, part in zip(samples, parts, strict=True)]


def calibration_calls(
    checkpoint: Checkpoint, component: str, samples: Sequence[Sample], before: Activations | None
) -> list[Call]:
    """The samples one at a time, image by image in the vision encoder.

    before: what the vision encoder gave, by the names of its calls.
    """
    model = checkpoint.model
    calls = []
    for number, sample in enumerate(samples):
        name = f"sample{number}"
        images = _vision_calls(checkpoint, name, sample.images) if sample.images else []
        if component == VISION:
            calls += images
            continue
        features = None
        if images:
            assert before is not None
            features = np.concatenate([before.read(each.name, OUTPUTS[VISION]) for each in images])
        length = len(sample.token_ids)
        positions = position_ids_of(checkpoint, sample)
        blocks = np.arange(-(-length // BLOCK_SIZE), dtype=np.int32)
        rows = np.unique(np.linspace(0, length - 1, min(length, LOGITS_ROWS)).astype(np.int64))
        stretch = Stretch(0, length, sample.token_ids, positions, blocks, features)
        calls.append(Call(name, decoder_feeds(model, [stretch], rows), name, len(blocks), 1))
    return calls
