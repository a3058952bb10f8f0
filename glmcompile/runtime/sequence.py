"""One request on its way through the engine: tokens, blocks, images, sampling options, progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.sampling_params import SamplingParams


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class ImageSpan:
    """An image of the prompt: its tokens are token_ids[start:start + num_tokens].

    places: which tokens of the prompt take its features, int64 in order, where others (of rows, of
        tiles) stand between them; None where all do.
    """

    start: int
    num_tokens: int
    image: ProcessedImage
    places: NDArray[np.int64] | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    def within(self, start: int, end: int) -> tuple[slice, NDArray[np.int64]]:
        """Which of its features the prompt's tokens start..end take, and the tokens that do."""
        if self.places is None:
            first, last = max(self.start, start), max(self.start, start, min(self.end, end))
            return slice(first - self.start, last - self.start), np.arange(first, last)
        first, last = np.searchsorted(self.places, (start, end))
        return slice(int(first), int(last)), self.places[first:last]


@dataclass(eq=False)
class Sequence:
    """A request's tokens and how far they are computed.

    token_ids: prompt and answer.
    positions: int64 [axes, prompt tokens]; token i of the answer is at i + position_offset.
    max_tokens: length of the answer at which it ends, context and cache taken into account.
    whole: ranges of the prompt whose tokens see each other, so that one step computes all of them.
    priority: the lower, the earlier it is admitted.
    num_computed_tokens: tokens whose keys and values are in the cache.
    num_cached_tokens: of those, how many were there before the request first ran.
    block_table: cache blocks in token order; block_hashes: keys of the full ones; the first
        num_committed_blocks have been offered for reuse (all three belong to BlockManager).
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    positions: NDArray[np.int64]
    position_offset: int
    max_tokens: int
    images: tuple[ImageSpan, ...] = ()
    whole: tuple[tuple[int, int], ...] = ()
    priority: int = 0
    state: State = State.WAITING
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_committed_blocks: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether what is left to compute belongs to the answer alone."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    def uncut(self, end: int) -> int:
        """The last place up to `end` where a step may stop."""
        inside = (start for start, stop in self.whole if start < end < stop)
        return max(next(inside, end), self.num_computed_tokens)

    @property
    def pending_images(self) -> list[ImageSpan]:
        """Images some of whose tokens are still to be computed."""
        return [span for span in self.images if span.end > self.num_computed_tokens]

    @property
    def answer_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class Chunk:
    """What one step computes of one sequence: token_ids[start:start + count]."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether this reaches the sequence's last token, whose logits give the next one."""
        return self.end == len(self.sequence)
