"""From the command to the first /ready, and what a server costs that nobody asks."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from server import served

IDLE_SECONDS = 10.0


def measure(engine: Path, repetitions: int) -> dict[str, Any]:
    seconds, idle = [], []
    for _ in range(repetitions):
        with served(engine) as server:
            seconds.append(server.ready_seconds)
            time.sleep(1)  # what starting left to do
            before = server.cpu_seconds()
            time.sleep(IDLE_SECONDS)
            idle.append((server.cpu_seconds() - before) / IDLE_SECONDS)
    return {"start_to_ready_s": statistics.median(seconds), "idle_cpu_of_a_core": max(idle)}
