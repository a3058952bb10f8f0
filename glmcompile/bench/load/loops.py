"""When requests are sent: when a client is free (closed loop), or when they are due (open)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Sends the request of this index, whose latencies count from this time of time.perf_counter.
Send = Callable[[int, float], Awaitable[None]]


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when the last was answered."""

    concurrency: int
    unit = "concurrency"

    @property
    def value(self) -> float:
        return self.concurrency

    @property
    def title(self) -> str:
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"

    def due(
        self, requests: int | None, duration: float | None, rng: np.random.Generator
    ) -> list[float]:
        """Seconds after the beginning, one for each request; `requests` is 32 unless given."""
        return [0.0] * (requests or 32)

    async def drive(self, send: Send, due: Sequence[float], duration: float | None) -> None:
        """Return when every request is answered; none is sent after `duration` seconds."""
        until = time.perf_counter() + (duration or math.inf)
        indices = iter(range(len(due)))

        async def client() -> None:
            for index in indices:
                now = time.perf_counter()
                if now >= until:
                    return
                await send(index, now)

        async with asyncio.TaskGroup() as clients:
            for _ in range(self.concurrency):
                clients.create_task(client())


@dataclass(frozen=True)
class OpenLoop:
    """Requests that arrive by chance, `rate` a second on average, whatever became of the others.

    Latencies count from when a request was due, so that neither a slow server nor a slow client
    thins out its own load unseen.
    """

    rate: float
    unit = "rate"

    @property
    def value(self) -> float:
        return self.rate

    @property
    def title(self) -> str:
        return f"{self.rate:g} requests/s"

    def due(
        self, requests: int | None, duration: float | None, rng: np.random.Generator
    ) -> list[float]:
        """Seconds after the beginning; 32 requests unless their number or a duration is given."""
        count = requests if requests is not None or duration is not None else 32
        return poisson_arrivals(self.rate, rng, count, duration)

    async def drive(self, send: Send, due: Sequence[float], duration: float | None) -> None:
        """Return when every request is answered."""
        began = time.perf_counter()
        async with asyncio.TaskGroup() as requests:
            for index, seconds in enumerate(due):
                await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
                requests.create_task(_sent(send, index, began + seconds))


Loop = ClosedLoop | OpenLoop


async def _sent(send: Send, index: int, at: float) -> None:
    await send(index, at)


def poisson_arrivals(
    rate: float, rng: np.random.Generator, count: int | None, duration: float | None
) -> list[float]:
    """Arrivals of a Poisson process, in seconds: exponential gaps of mean 1/rate.

    Ends after `count` arrivals or `duration` seconds, whichever is first; one of them is given.
    """
    arrivals: list[float] = []
    now = rng.exponential(1 / rate)
    while (count is None or len(arrivals) < count) and (duration is None or now < duration):
        arrivals.append(now)
        now += rng.exponential(1 / rate)
    return arrivals
