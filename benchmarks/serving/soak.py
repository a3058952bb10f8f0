"""Memory of a server under load for many minutes, with images that are never the same."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from images import questions
from reliability import body, hang_up
from server import served

CLIENTS = 4
# Caches of images and prefixes fill first; growth counts from here on.
SETTLE = 0.25


def measure(engine: Path, minutes: float) -> dict[str, Any]:
    """Resident memory over time; growth is from the first quarter's end to the end, by a line."""
    samples: list[tuple[float, float]] = []
    with served(engine, "--kv-cache-memory", "64MiB") as server:
        end = time.monotonic() + 60 * minutes
        answered = [0] * CLIENTS

        def client(place: int) -> None:
            for seed in range(10**9):
                for image, prompt in questions(9, seed=1_000_000 * (place + 1) + seed):
                    if time.monotonic() > end:
                        return
                    encoded = json.dumps(body(image, prompt)).encode()
                    if answered[place] % 20 == 19:
                        hang_up(server, encoded)
                    status, answer = server.post("/v1/chat/completions", encoded)
                    if status != 200:
                        raise RuntimeError(f"status {status}: {answer}")
                    answered[place] += 1

        threads = [threading.Thread(target=client, args=(place,)) for place in range(CLIENTS)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while time.monotonic() < end:
            time.sleep(min(2.0, max(end - time.monotonic(), 0.01)))
            samples.append((time.monotonic() - began, server.resident_mb()))
        for thread in threads:
            thread.join()
        kv_usage = server.metric("vllm:kv_cache_usage_perc")
    settled = np.array([sample for sample in samples if sample[0] >= SETTLE * samples[-1][0]])
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0]
    return {
        "minutes": minutes,
        "requests": sum(answered),
        "resident_mb": {
            "settled": float(settled[0, 1]),
            "end": float(settled[-1, 1]),
            "largest": float(settled[:, 1].max()),
            "every_minute": [
                float(row[1]) for row in samples[:: max(1, len(samples) // int(minutes))]
            ],
        },
        "soak_memory_growth_mb": float(slope * (settled[-1, 0] - settled[0, 0])),
        "left_kv_usage": kv_usage,
    }
