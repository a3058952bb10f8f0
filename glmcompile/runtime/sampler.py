"""The next token from logits: penalties, temperature, top-k, top-p, one generator per request.

Order and formulas as in Hugging Face's logits processors and vLLM's sampler: min_tokens mask,
repetition penalty (CTRL, Keskar et al. 2019: positive logits divided, negative multiplied, over
prompt and answer), frequency and presence penalties (OpenAI: subtracted, over the answer alone),
temperature, top-k (ties with the k-th kept), top-p on what is left, renormalised (Holtzman et al.
2020: the smallest set of most likely tokens that reaches p).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.runtime.sequence import SamplingParams

# Most probability lies on few tokens; sorting these alone nearly always settles top-p.
_NUCLEUS_GUESS = 512


@dataclass(frozen=True)
class Sampled:
    """A chosen token; with `logprobs`, its log-probability and those of the most likely tokens.

    Log-probabilities are the model's own: of the logits before penalties and temperature.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SamplingState:
    """What choosing one request's tokens depends on besides the logits.

    The generator is the request's own, and each token takes one number from it, so neither the
    batch nor a preemption changes what a seed gives.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]
    ) -> None:
        """end_ids: tokens that end the answer, masked until it has min_tokens."""
        self.params = params
        self.end_ids = np.array(sorted(set(end_ids)), np.int64)
        # Greedy requests draw nothing, and importing numpy.random takes longer than answering some.
        self._generator = np.random.default_rng(params.seed) if params.temperature > 0 else None
        self._num_tokens = 0
        self._penalised = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._repeats = params.repetition_penalty != 1
        self._seen = np.array(list(set(prompt_ids)) if self._repeats else [], np.int64)
        self._answer_ids = np.empty(0, np.int64)
        self._counts = np.empty(0, np.float32)

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return (
            self.params.temperature == 0
            and not self._penalised
            and not self._repeats
            and self.params.logprobs is None
            and self._num_tokens >= self.params.min_tokens
        )

    def accept(self, token: int) -> None:
        """Count a chosen token."""
        self._num_tokens += 1
        if self._repeats and token not in self._seen:
            self._seen = np.append(self._seen, token)
        if self._penalised:
            place = np.flatnonzero(self._answer_ids == token)
            if len(place):
                self._counts[place] += 1
            else:
                self._answer_ids = np.append(self._answer_ids, token)
                self._counts = np.append(self._counts, np.float32(1))

    def penalise(self, logits: NDArray[np.float32]) -> None:
        """Change logits [vocab] in place by min_tokens and the penalties."""
        params = self.params
        if self._num_tokens < params.min_tokens:
            logits[self.end_ids] = -np.inf
        if self._repeats:
            seen = logits[self._seen]
            penalty = np.float32(params.repetition_penalty)
            logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._penalised:
            logits[self._answer_ids] -= np.float32(
                params.frequency_penalty
            ) * self._counts + np.float32(params.presence_penalty)

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Choose a token by penalised logits [vocab]."""
        params = self.params
        if self._generator is None:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, params.temperature, params.top_k, params.top_p)
        cumulative = np.cumsum(probabilities)
        # Always below the total, by the generator's half-open interval.
        point = self._generator.random() * cumulative[-1]
        return int(ids[min(np.searchsorted(cumulative, point, side="right"), len(ids) - 1)])


def sample(logits: NDArray[np.float32], states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose one token per row of logits float32 [rows, vocab], which it may overwrite.

    The states are not advanced; call `accept` for each token that is kept.
    """
    if all(state.takes_argmax for state in states):
        return [Sampled(token) for token in logits.argmax(axis=1).tolist()]
    return [_sample_row(row, state) for row, state in zip(logits, states, strict=True)]


def candidates(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that can be drawn and their probabilities, the most likely first.

    Equally likely tokens come in the order of their ids. Without top_k and top_p the order is that
    of the ids, which needs no sorting.
    """
    largest, ids = logits.max(), None
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    elif top_p >= 1:
        weights = _weights(logits, largest, temperature).astype(np.float64)
        return np.arange(len(logits)), weights / weights.sum()
    elif len(logits) > 2 * _NUCLEUS_GUESS:
        total = _weights(logits, largest, temperature).sum(dtype=np.float64)
        likely = np.flatnonzero(logits >= np.partition(logits, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS])
        likely = _by_likelihood(likely, logits)
        weights = _weights(logits[likely].astype(np.float64), largest, temperature) / total
        if weights.sum() >= top_p:
            return _nucleus(likely, weights, top_p)
    ids = _by_likelihood(np.arange(len(logits)) if ids is None else ids, logits)
    weights = _weights(logits[ids].astype(np.float64), largest, temperature)
    probabilities = weights / weights.sum()
    return _nucleus(ids, probabilities, top_p) if top_p < 1 else (ids, probabilities)


def _weights(logits: NDArray[Any], largest: Any, temperature: float) -> NDArray[Any]:
    """Unnormalised probabilities, 1 for the most likely token, in the logits' own type."""
    return np.exp((logits - largest) / logits.dtype.type(temperature))


def _by_likelihood(ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return ids[np.argsort(-logits[ids], kind="stable")]


def _nucleus(
    ids: NDArray[np.int64], probabilities: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the tokens before which less than top_p has been reached; the first in any case."""
    before = np.cumsum(probabilities) - probabilities
    count = max(1, int(np.searchsorted(before, top_p, side="left")))
    kept = probabilities[:count]
    return ids[:count], kept / kept.sum()


def _sample_row(logits: NDArray[np.float32], state: SamplingState) -> Sampled:
    wanted = state.params.logprobs
    if wanted is None:
        state.penalise(logits)
        return Sampled(state.draw(logits))
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    state.penalise(logits)
    token = state.draw(logits)
    count = min(wanted, len(logprobs))
    top = np.argpartition(logprobs, -count)[-count:] if count else np.empty(0, np.int64)
    top = top[np.lexsort((top, -logprobs[top]))]
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))
