"""What HTTP adds to one client's time to first token and time per token."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from server import served, stream

import glmcompile

ANSWER_TOKENS = 64
PROMPT = "Write down what you see when you look out of a window on a rainy day in autumn. " * 6


def measure(engine: Path, repetitions: int) -> dict[str, Any]:
    """The same questions in turns, to a server and to an engine in this process."""
    figures: dict[str, list[float]] = {
        f"{who}_{what}": [] for who in ("python", "http") for what in ("ttft_ms", "tpot_ms")
    }
    with served(engine) as server, glmcompile.load(engine) as loaded:
        for repetition in range(-1, repetitions):
            # Questions of their own, so that none finds its beginning in the prefix cache.
            asked = [{"role": "user", "content": f"{who}{repetition}. {PROMPT}"} for who in "ab"]
            began = time.perf_counter()
            with loaded.stream(
                messages=[asked[0]], max_tokens=ANSWER_TOKENS, ignore_eos=True
            ) as answer:
                times = []
                while answer.completion is None:
                    answer.wait()
                    times.append(time.perf_counter())
            here = {
                "python_ttft_ms": 1e3 * (times[0] - began),
                "python_tpot_ms": 1e3 * (times[-1] - times[0]) / (ANSWER_TOKENS - 1),
            }
            got = stream(
                server,
                {
                    "messages": [asked[1]],
                    "max_tokens": ANSWER_TOKENS,
                    "ignore_eos": True,
                    "temperature": 0,
                },
            )
            there = {"http_ttft_ms": 1e3 * got.ttft, "http_tpot_ms": 1e3 * got.tpot}
            if repetition >= 0:
                for name, value in (here | there).items():
                    figures[name].append(value)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "repetitions": repetitions,
        "answer_tokens": ANSWER_TOKENS,
        "medians": {name: round(value, 3) for name, value in medians.items()},
        "http_tpot_overhead": medians["http_tpot_ms"] / medians["python_tpot_ms"] - 1,
        "http_ttft_overhead_ms": medians["http_ttft_ms"] - medians["python_ttft_ms"],
    }
