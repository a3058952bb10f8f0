"""One request on its way through the engine: tokens, blocks, images, sampling options, progress."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import InputError
from glmcompile.runtime.image_processor import ProcessedImage

# Logits divided by less could overflow; vLLM draws the same line.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How an answer's tokens are chosen and when it ends.

    max_tokens: None means as many as context and cache hold.
    min_tokens: no end-of-sequence or stop token before this many.
    temperature: 0 takes the most likely token (greedy), and so does anything below 1e-5.
    top_k: sample among the k most likely tokens; 0 means all.
    top_p: sample among the most likely tokens whose probabilities reach this sum.
    repetition_penalty: > 1 discourages every token of prompt and answer (CTRL, Keskar et al. 2019).
    frequency_penalty, presence_penalty: subtracted per occurrence, or once, in the answer (OpenAI).
    seed: the same seed gives the same answer, whatever else runs; None draws one.
    stop: the answer ends before the first of these strings.
    stop_token_ids: the answer ends at any of these tokens, besides the model's own.
    ignore_eos: go on past the model's own end-of-sequence tokens.
    logprobs: also report this many most likely tokens per position, and the chosen one.
    Raises InputError naming the option that is out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._integer("max_tokens", 1, optional=True)
        self._integer("min_tokens", 0)
        self._integer("top_k", 0)
        self._integer("seed", 0, optional=True)
        self._integer("logprobs", 0, optional=True)
        self._number("temperature", 0.0, math.inf)
        if self.temperature < _GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("repetition_penalty", 0.0, math.inf, open_low=True)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("presence_penalty", -2.0, 2.0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; "
                "min_tokens must not be the larger"
            )
        if not all(isinstance(item, str) and item for item in stop):
            raise InputError(f"stop is {self.stop!r}; expected strings that are not empty")
        if not all(isinstance(item, int) and item >= 0 for item in self.stop_token_ids):
            raise InputError(f"stop_token_ids is {self.stop_token_ids!r}; expected token ids")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SamplingParams:
        """Raises InputError naming an option that does not exist."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"no sampling option {name!r}; there are {', '.join(known)}")
        return cls(**options)

    def _integer(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
            raise InputError(f"{name} is {value!r}; expected an integer of at least {low}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if (
            not number
            or not math.isfinite(value)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            above = "above" if open_low else "of at least"
            below = "" if high == math.inf else f" and at most {high:g}"
            raise InputError(f"{name} is {value!r}; expected a number {above} {low:g}{below}")
        object.__setattr__(self, name, float(value))


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class ImageSpan:
    """An image of the prompt: its tokens are token_ids[start:start + num_tokens]."""

    start: int
    num_tokens: int
    image: ProcessedImage

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(eq=False)
class Sequence:
    """A request's tokens and how far they are computed.

    token_ids: prompt and answer.
    positions: int64 [axes, prompt tokens]; token i of the answer is at i + position_offset.
    max_tokens: length of the answer at which it ends, context and cache taken into account.
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
