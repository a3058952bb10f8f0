"""Figures of one load level from what became of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmcompile.bench.load.answer import Answer, RequestError

LATENCIES = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    started: when its latencies count from, on the clock of the answer; retries: how often it was
    sent again.
    """

    started: float
    result: Answer | RequestError
    retries: int = 0


@dataclass(frozen=True)
class Latency:
    """Of one answer, in milliseconds.

    ttft: to the first chunk with choices; e2e: to the last; tpot: (e2e - ttft) / (tokens - 1), None
    for a single token; itl: between chunks that follow each other.
    """

    ttft: float
    tpot: float | None
    itl: tuple[float, ...]
    e2e: float


def latency(started: float, answer: Answer) -> Latency:
    """Of an answer to a request that was sent at `started` (seconds)."""
    first, *_ = answer.arrivals
    later = answer.output_tokens - 1
    gaps = np.diff(answer.arrivals) * 1e3
    return Latency(
        ttft=(first - started) * 1e3,
        tpot=(answer.ended - first) / later * 1e3 if later > 0 else None,
        itl=tuple(gaps.tolist()),
        e2e=(answer.ended - started) * 1e3,
    )


def summarize(
    outcomes: Sequence[Outcome], seconds: float, slo: dict[str, float] | None = None
) -> dict[str, Any]:
    """Counts, latencies, throughput and goodput of `outcomes`, which took `seconds` together.

    slo: the most milliseconds of any of ttft, tpot and e2e. Goodput (DistServe, arXiv 2401.09670)
    counts the answers that keep all of them, an answer of one token having no tpot to keep.
    """
    answered = [(each.started, each.result) for each in outcomes if isinstance(each.result, Answer)]
    latencies = [latency(started, answer) for started, answer in answered]
    answers = [answer for _, answer in answered]
    prompt = sum(answer.prompt_tokens for answer in answers)
    output = sum(answer.output_tokens for answer in answers)
    summary: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(outcomes),
        "answered": len(answers),
        "failed": len(outcomes) - len(answers),
        "errors": _errors(outcomes),
        "retries": sum(each.retries for each in outcomes),
        "retried_requests": sum(each.retries > 0 for each in outcomes),
        "prompt_tokens": prompt,
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "output_tokens": output,
        "ttft_ms": _statistics([each.ttft for each in latencies]),
        "tpot_ms": _statistics([each.tpot for each in latencies if each.tpot is not None]),
        "itl_ms": _statistics([gap for each in latencies for gap in each.itl]),
        "e2e_ms": _statistics([each.e2e for each in latencies]),
        "requests_per_s": len(answers) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (prompt + output) / seconds,
    }
    if slo:
        good = sum(_keeps(each, slo) for each in latencies)
        summary["goodput_per_s"] = good / seconds
        summary["goodput_fraction"] = good / len(outcomes) if outcomes else None
    return summary


def _statistics(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles interpolate linearly between ranks; None of no values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}


def _errors(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    errors: dict[str, dict[str, Any]] = {}
    for each in outcomes:
        if isinstance(each.result, RequestError):
            kind = errors.setdefault(each.result.kind, {"count": 0, "first": str(each.result)})
            kind["count"] += 1
    return errors


def _keeps(latency: Latency, slo: dict[str, float]) -> bool:
    found = {name: getattr(latency, name) for name in slo}
    return all(value is None or value <= slo[name] for name, value in found.items())
