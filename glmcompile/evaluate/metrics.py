"""How close two models' predictions are, and how well one predicts: functions over logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows of logits converted to float64 at a time; vocabularies are large.
_ROWS = 64


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token, each an array [tokens].

    nll: negative log probability that the model gave the true token, in nats.
    agrees: whether the model's most likely token is the baseline's.
    kl: KL(baseline || model) of the two distributions over the vocabulary, in nats.
    """

    nll: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    kl: NDArray[np.float64]


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def negative_log_likelihood(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Nats per token: logits [tokens, vocab], targets [tokens] -> [tokens]."""
    parts = [
        -np.take_along_axis(
            log_probabilities(logits[row : row + _ROWS]), targets[row : row + _ROWS, None], axis=-1
        )[:, 0]
        for row in range(0, len(targets), _ROWS)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def kl_divergence(baseline: NDArray[np.float32], model: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(baseline || model) in nats per row, from logits [tokens, vocab] of each."""
    parts = []
    for row in range(0, len(baseline), _ROWS):
        p = log_probabilities(baseline[row : row + _ROWS])
        q = log_probabilities(model[row : row + _ROWS])
        parts.append((np.exp(p) * (p - q)).sum(axis=-1))
    # Rounding can leave a sum of two equal distributions a hair below zero.
    return np.maximum(np.concatenate(parts), 0.0) if parts else np.empty(0)


def score(
    baseline: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.int64]
) -> TokenScores:
    """Compare two models' logits [tokens, vocab] on the same true tokens [tokens]."""
    return TokenScores(
        negative_log_likelihood(model, targets),
        baseline.argmax(axis=-1) == model.argmax(axis=-1),
        kl_divergence(baseline, model),
    )


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp of the mean negative log likelihood per token."""
    return float(np.exp(nll.mean()))
