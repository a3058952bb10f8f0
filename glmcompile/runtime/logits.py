"""Logits processors: what changes logits before a token is chosen, one small class each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class LogitsProcessor(Protocol):
    """Changes the logits of one request, and is told of each token it gets."""

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Change logits [vocab] in place."""

    def accept(self, token: int) -> None:
        """Count a token of the answer."""


class Constraint(LogitsProcessor, Protocol):
    """A processor that knows how the answer must go on (a grammar)."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but its end may follow."""

    def forced(self) -> list[int]:
        """The tokens that have to come next, where there is no choice; [] otherwise."""


class MinTokens:
    """No end token before the answer has `count` tokens, unless it can only end."""

    def __init__(self, count: int, end_ids: Collection[int]) -> None:
        self.left = count
        self._end_ids = np.array(sorted(set(end_ids)), np.int64)

    def mask(self, logits: NDArray[np.float32]) -> None:
        ends = logits[self._end_ids]
        logits[self._end_ids] = -np.inf
        if len(ends) and logits.max() == -np.inf:  # a finished grammar leaves the ends alone
            logits[self._end_ids] = ends

    def accept(self, token: int) -> None:
        self.left -= 1


class LogitBias:
    """Adds a fixed number to the logits of single tokens (OpenAI's logit_bias)."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.array(list(bias), np.int64)
        self._values = np.array(list(bias.values()), np.float32)

    def mask(self, logits: NDArray[np.float32]) -> None:
        logits[self._ids] += self._values

    def accept(self, token: int) -> None:
        pass


class RepetitionPenalty:
    """Discourages every token of prompt and answer.

    CTRL, Keskar et al. 2019: positive logits divided, negative ones multiplied.
    """

    def __init__(self, penalty: float, prompt_ids: Iterable[int]) -> None:
        self._penalty = np.float32(penalty)
        self._seen = np.array(list(set(prompt_ids)), np.int64)

    def mask(self, logits: NDArray[np.float32]) -> None:
        seen = logits[self._seen]
        logits[self._seen] = np.where(seen > 0, seen / self._penalty, seen * self._penalty)

    def accept(self, token: int) -> None:
        if token not in self._seen:
            self._seen = np.append(self._seen, token)


class FrequencyPresencePenalty:
    """Subtracts per occurrence, and once, from the logits of tokens of the answer (OpenAI)."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = np.float32(frequency), np.float32(presence)
        self._ids = np.empty(0, np.int64)
        self._counts = np.empty(0, np.float32)

    def mask(self, logits: NDArray[np.float32]) -> None:
        logits[self._ids] -= self._frequency * self._counts + self._presence

    def accept(self, token: int) -> None:
        place = np.flatnonzero(self._ids == token)
        if len(place):
            self._counts[place] += 1
        else:
            self._ids = np.append(self._ids, token)
            self._counts = np.append(self._counts, np.float32(1))
