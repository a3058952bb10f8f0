"""Four streams decode while a screenshot is encoded and prefilled: who waits for whom.

A token costs more the longer an answer has grown, so the times without the screenshot are taken
before it and after it. The streams say a few words of ASCII over and over: a random model's own
tokens are often parts of a character, which a server holds back until it is whole.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from images import part, screenshot
from server import Answer, Server, served, stream

STREAMS = 4
QUIET_SECONDS = 6.0
SETTLE_SECONDS = 1.5  # after a change of load


def measure(engine: Path, repetitions: int) -> dict[str, Any]:
    """Inter-token times and the screenshot's time to first token, with and without the others."""
    runs = []
    with served(engine) as server:
        ask_about(server, seed=99)  # warm-up
        for repetition in range(repetitions):
            runs.append(run(server, seed=2 * repetition))
    ratios = [one["itl_p99_ms"]["beside"] / one["itl_p99_ms"]["without"] for one in runs]
    ttfts = [one["ttft_s"]["beside"] / one["ttft_s"]["alone"] for one in runs]
    return {
        "streams": STREAMS,
        "runs": runs,
        "itl_p99_during_prefill_ratio": float(np.median(ratios)),
        "screenshot_ttft_ratio": float(np.median(ttfts)),
    }


def run(server: Server, seed: int) -> dict[str, Any]:
    alone = ask_about(server, seed).ttft
    words = json.dumps({"prompt": " one two three four five six seven eight"}).encode()
    status, tokens = server.post("/tokenize", words)
    if status != 200:
        raise RuntimeError(f"status {status}: {tokens}")
    answers: list[Answer] = []
    stop = threading.Event()

    def talk(number: int) -> None:
        answers.append(
            stream(
                server,
                {
                    "messages": [{"role": "user", "content": f"{number}: tell me a story."}],
                    "max_tokens": 6000,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logit_bias": {str(token): 100 for token in tokens["tokens"]},
                },
                stop,
            )
        )

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    time.sleep(QUIET_SECONDS)
    began = time.perf_counter()
    shown = ask_about(server, seed + 1)
    ended = time.perf_counter()
    time.sleep(QUIET_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    first = shown.times[0]
    if any(answer.finish_reason for answer in answers):
        raise RuntimeError("a stream ended before the measurement; make them longer")
    before = gaps(answers, began - QUIET_SECONDS + SETTLE_SECONDS, began)
    after = gaps(answers, ended + SETTLE_SECONDS, ended + QUIET_SECONDS)
    without = np.concatenate([before, after])
    beside = gaps(answers, began, first)

    def percentiles(q: int) -> dict[str, float]:
        times = {"without": without, "beside": beside}
        return {name: 1e3 * float(np.percentile(one, q)) for name, one in times.items()}

    return {
        "itl_p50_ms": percentiles(50),
        "itl_p99_ms": percentiles(99),
        "tokens": {"without": len(without), "beside": len(beside)},
        "ttft_s": {"alone": alone, "beside": shown.ttft},
    }


def ask_about(server: Server, seed: int) -> Answer:
    content = [part(screenshot(seed)), {"type": "text", "text": "Open Settings."}]
    return stream(
        server,
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
        },
    )


def gaps(answers: list[Answer], start: float, end: float) -> np.ndarray[Any, Any]:
    """Seconds from one token to the next, of those that came between start and end."""
    found = [
        np.diff([moment for moment in answer.times if start <= moment <= end]) for answer in answers
    ]
    return np.concatenate(found)
