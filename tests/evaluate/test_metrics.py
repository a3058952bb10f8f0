"""Metrics over logits against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from glmcompile.evaluate import metrics


def logits(*distributions: list[float]) -> np.ndarray:
    """Logits of probabilities, each row moved by a constant, which must not matter."""
    rows = np.log(np.array(distributions))
    return (rows + np.arange(len(rows))[:, None] * 3).astype(np.float32)


def test_kl_divergence_of_two_distributions() -> None:
    p, q = logits([0.5, 0.25, 0.25]), logits([0.25, 0.25, 0.5])
    # 0.5 ln 2 + 0.25 ln 1 + 0.25 ln 0.5
    assert metrics.kl_divergence(p, q) == pytest.approx([0.25 * np.log(2)], rel=1e-5)


def test_kl_divergence_is_not_symmetric() -> None:
    p, q = logits([0.5, 0.5]), logits([0.9, 0.1])
    assert metrics.kl_divergence(p, q) == pytest.approx([np.log(0.5 / 0.3)], rel=1e-5)
    forward, back = metrics.kl_divergence(p, q), metrics.kl_divergence(q, p)
    assert back == pytest.approx([0.9 * np.log(1.8) + 0.1 * np.log(0.2)], rel=1e-5)
    assert forward[0] > back[0]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    rows = np.full((5, 40), 7.0, np.float32)
    nll = metrics.negative_log_likelihood(rows, np.arange(5))
    assert metrics.perplexity(nll) == pytest.approx(40)


def test_perplexity_is_the_geometric_mean_of_inverse_probabilities() -> None:
    rows = logits([0.5, 0.25, 0.25], [0.5, 0.375, 0.125])
    nll = metrics.negative_log_likelihood(rows, np.array([0, 2]))
    assert metrics.perplexity(nll) == pytest.approx(4.0, rel=1e-5)  # sqrt(2 * 8)


def test_agreement_compares_most_likely_tokens_and_not_targets() -> None:
    baseline = logits([0.6, 0.3, 0.1], [0.2, 0.7, 0.1])
    model = logits([0.5, 0.4, 0.1], [0.6, 0.3, 0.1])
    scores = metrics.score(baseline, model, np.array([2, 0]))
    assert scores.agrees.tolist() == [True, False]
    assert scores.nll == pytest.approx([-np.log(0.1), -np.log(0.6)], rel=1e-5)


def test_huge_logits_do_not_overflow() -> None:
    rows = np.array([[3e4, -3e4], [-3e4, 3e4]], np.float32)
    assert np.isfinite(metrics.kl_divergence(rows, rows[::-1])).all()


def test_many_rows_give_what_each_row_gives_alone() -> None:
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 150, 12)).astype(np.float32)
    targets = random.integers(12, size=150)
    alone = [metrics.score(p[i : i + 1], q[i : i + 1], targets[i : i + 1]) for i in range(150)]
    together = metrics.score(p, q, targets)
    assert together.kl == pytest.approx(np.concatenate([score.kl for score in alone]))
    assert together.nll == pytest.approx(np.concatenate([score.nll for score in alone]))
