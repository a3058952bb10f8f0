"""Figures of a level against values computed by hand."""

from __future__ import annotations

import pytest

from glmcompile.bench.load.answer import Answer, RequestError
from glmcompile.bench.load.summary import Outcome, latency, summarize


def answered(started: float, *arrivals: float, tokens: int, retries: int = 0) -> Outcome:
    answer = Answer(arrivals, arrivals[-1], prompt_tokens=10, cached_tokens=2, output_tokens=tokens)
    return Outcome(started, answer, retries)


def test_latencies_of_one_answer() -> None:
    # Two tokens came together, so three arrivals stand for four tokens.
    answer = Answer((2.0, 2.5, 3.5), 3.8, prompt_tokens=1, cached_tokens=0, output_tokens=4)
    found = latency(1.0, answer)
    assert found.ttft == pytest.approx(1000)
    assert found.e2e == pytest.approx(2800)
    assert found.tpot == pytest.approx(1800 / 3)
    assert found.itl == pytest.approx((500, 1000))


def test_one_token_has_no_time_per_output_token() -> None:
    found = latency(1.0, Answer((2.0,), 2.0, prompt_tokens=1, cached_tokens=0, output_tokens=1))
    assert found.tpot is None
    assert found.itl == ()


def test_statistics_interpolate_between_ranks() -> None:
    # TTFT 100, 200, ..., 500 ms.
    outcomes = [answered(0.0, ttft / 10, tokens=1) for ttft in range(1, 6)]
    ttft = summarize(outcomes, seconds=2.0)["ttft_ms"]
    assert ttft == pytest.approx({"mean": 300, "p50": 300, "p90": 460, "p99": 496})


def test_gaps_of_all_answers_are_pooled() -> None:
    outcomes = [
        answered(0.0, 1.0, 1.1, 1.2, 1.3, tokens=4),
        answered(0.0, 1.0, 1.5, tokens=2),
    ]
    summary = summarize(outcomes, seconds=1.0)
    assert summary["itl_ms"]["mean"] == pytest.approx((3 * 100 + 500) / 4)
    assert summary["itl_ms"]["p50"] == pytest.approx(100)
    assert summary["tpot_ms"]["mean"] == pytest.approx((100 + 500) / 2)


def test_throughput_counts_answers_alone() -> None:
    outcomes = [
        answered(0.0, 1.0, 2.0, tokens=6),
        answered(0.0, 1.0, 2.0, tokens=4, retries=2),
        Outcome(0.0, RequestError("HTTP 429", "full", status=429), retries=1),
        Outcome(0.0, RequestError("HTTP 429", "full again", status=429)),
        Outcome(0.0, RequestError("time-out", "slow")),
    ]
    summary = summarize(outcomes, seconds=4.0)
    assert (summary["requests"], summary["answered"], summary["failed"]) == (5, 2, 3)
    assert summary["errors"] == {
        "HTTP 429": {"count": 2, "first": "full"},
        "time-out": {"count": 1, "first": "slow"},
    }
    assert (summary["retries"], summary["retried_requests"]) == (3, 2)
    assert summary["requests_per_s"] == 0.5
    assert summary["output_tokens_per_s"] == 2.5
    assert summary["total_tokens_per_s"] == 7.5
    assert (summary["prompt_tokens"], summary["cached_tokens"]) == (20, 4)


def test_goodput_counts_answers_that_keep_every_objective() -> None:
    outcomes = [
        answered(0.0, 0.5, 0.6, tokens=2),  # TTFT 500, TPOT 100: both kept, exactly
        answered(0.0, 0.4, 0.6, tokens=2),  # TPOT 200
        answered(0.0, 0.6, 0.7, tokens=2),  # TTFT 600
        answered(0.0, 0.1, tokens=1),  # no TPOT to keep
        Outcome(0.0, RequestError("connection", "gone")),
    ]
    slo = {"ttft": 500.0, "tpot": 100.0 + 1e-6}
    summary = summarize(outcomes, seconds=2.0, slo=slo)
    assert summary["goodput_per_s"] == 1.0
    assert summary["goodput_fraction"] == 0.4


def test_a_level_without_answers_has_no_latencies() -> None:
    summary = summarize([Outcome(0.0, RequestError("connection", "gone"))], 1.0, {"ttft": 1.0})
    assert summary["ttft_ms"] is summary["tpot_ms"] is summary["itl_ms"] is None
    assert summary["goodput_fraction"] == 0
