"""The next token from logits: processors, temperature, top-k, top-p, min-p, one generator each.

Order and formulas as in Hugging Face's logits processors and vLLM's sampler: bias, penalties,
grammar, min_tokens mask (logits.py), temperature, top-k (ties with the k-th kept), top-p on what is
left, renormalised (Holtzman et al. 2020: the smallest set of most likely tokens that reaches p),
min-p (Nguyen et al. 2024: tokens of at least that share of the largest probability; last, as in
Hugging Face's).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import ComputeError
from glmcompile.runtime.logits import (
    Constraint,
    FrequencyPresencePenalty,
    LogitBias,
    LogitsProcessor,
    MinTokens,
    RepetitionPenalty,
)
from glmcompile.runtime.sampling_params import SamplingParams

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
    batch nor a preemption changes what a seed gives. Forced tokens take none.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        grammar: Constraint | None = None,
    ) -> None:
        """end_ids: tokens that end the answer, masked until it has min_tokens.

        grammar: params.grammar, compiled, for this request alone.
        """
        self.params = params
        # Greedy requests draw nothing, and importing numpy.random takes longer than answering some.
        self._generator = np.random.default_rng(params.seed) if params.temperature > 0 else None
        self._grammar = grammar
        self._processors: list[LogitsProcessor] = []
        if params.logit_bias:
            self._processors.append(LogitBias(params.logit_bias))
        if params.repetition_penalty != 1:
            self._processors.append(RepetitionPenalty(params.repetition_penalty, prompt_ids))
        if params.frequency_penalty != 0 or params.presence_penalty != 0:
            self._processors.append(
                FrequencyPresencePenalty(params.frequency_penalty, params.presence_penalty)
            )
        if grammar is not None:
            self._processors.append(grammar)
        # Last, because it gives way where the others leave nothing but an end.
        self._min_tokens = MinTokens(params.min_tokens, end_ids)
        if params.min_tokens:
            self._processors.append(self._min_tokens)

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return (
            self.params.temperature == 0 and self.params.logprobs is None and not self._processors
        )

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete, so that the answer can only end."""
        return self._grammar is not None and self._grammar.finished

    def forced(self) -> list[int]:
        """Tokens that the grammar leaves no choice about, which need not be computed.

        Each that is kept must be accepted. None where logprobs are wanted, which forced tokens
        do not have.
        """
        if self._grammar is None or self.params.logprobs is not None:
            return []
        return self._grammar.forced()

    def accept(self, token: int) -> None:
        """Count a chosen or forced token. Raises InputError where a grammar cannot go on."""
        for processor in self._processors:
            processor.accept(token)
        if self._min_tokens.left == 0 and self._min_tokens in self._processors:
            self._processors.remove(self._min_tokens)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Change logits [vocab] in place by every processor, in order."""
        for processor in self._processors:
            processor.mask(logits)

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Choose a token by masked logits [vocab]."""
        params = self.params
        if self._generator is None:
            return int(logits.argmax())
        ids, probabilities = candidates(
            logits, params.temperature, params.top_k, params.top_p, params.min_p
        )
        cumulative = np.cumsum(probabilities)
        point = self._generator.random() * cumulative[-1]
        # The product may round up to the total, which the last token that can be drawn reaches.
        last = np.searchsorted(cumulative, cumulative[-1])
        return int(ids[min(np.searchsorted(cumulative, point, side="right"), last)])


def sample(
    logits: NDArray[np.float32], states: Sequence[SamplingState]
) -> list[Sampled | Exception]:
    """Choose one token per row of logits float32 [rows, vocab], which it may overwrite.

    A row that gives no token has its exception in its place and touches no other: ComputeError for
    logits that are not numbers or allow nothing, and whatever a processor raises. The states are
    not advanced; call `accept` for each token that is kept.
    """
    if all(state.takes_argmax for state in states):
        tokens = logits.argmax(axis=1)  # a NaN is the largest to argmax, so one look finds any
        largest = logits[np.arange(len(tokens)), tokens]
        if np.isfinite(largest).all():
            return [Sampled(token) for token in tokens.tolist()]
    return [_sample_row(row, state) for row, state in zip(logits, states, strict=True)]


def candidates(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that can be drawn and their probabilities, the most likely first.

    Equally likely tokens come in the order of their ids. Without top_k and top_p the order is that
    of the ids, which needs no sorting.
    """
    ids, probabilities = _most_likely(logits, temperature, top_k, top_p)
    if min_p == 0:
        return ids, probabilities
    kept = probabilities >= min_p * probabilities.max()
    return ids[kept], probabilities[kept] / probabilities[kept].sum()


def _most_likely(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What temperature, top-k and top-p leave."""
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


def _sample_row(logits: NDArray[np.float32], state: SamplingState) -> Sampled | Exception:
    wanted = state.params.logprobs
    try:
        if not np.isfinite(logits.max()):
            raise ComputeError(
                "the model's logits are not numbers, so no token can be chosen; "
                "its weights or this input overflow"
            )
        logprobs = None if wanted is None else _logprobs(logits)
        state.mask(logits)
        if logits.max() == -np.inf:
            raise ComputeError("no token is left to choose: the request's grammar rules out all")
        token = state.draw(logits)
    except Exception as error:
        return error
    if wanted is None or logprobs is None:
        return Sampled(token)
    return _reported(token, logprobs, wanted)


def _logprobs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    return logprobs


def _reported(token: int, logprobs: NDArray[np.float64], wanted: int) -> Sampled:
    """The token with its log-probability and those of the most likely `wanted` tokens."""
    count = min(wanted, len(logprobs))
    top = np.argpartition(logprobs, -count)[-count:] if count else np.empty(0, np.int64)
    top = top[np.lexsort((top, -logprobs[top]))]
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))
