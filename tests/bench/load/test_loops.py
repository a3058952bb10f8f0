"""When requests are sent: order, number at once, and arrivals by chance."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from glmcompile.bench.load.loops import ClosedLoop, OpenLoop, poisson_arrivals


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_gaps_of_arrivals_are_exponential() -> None:
    arrivals = poisson_arrivals(4.0, rng(), 20_000, None)
    gaps = np.diff([0.0, *arrivals])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential, its mean
    assert (gaps < 0.25).mean() == pytest.approx(1 - np.exp(-1), abs=0.01)


def test_a_duration_gives_as_many_as_the_rate_says() -> None:
    arrivals = poisson_arrivals(50.0, rng(), None, 200.0)
    assert len(arrivals) == pytest.approx(10_000, rel=0.04)
    assert max(arrivals) < 200


def test_number_and_duration_bound_both_loops() -> None:
    assert len(OpenLoop(10).due(5, 1000.0, rng())) == 5
    assert len(OpenLoop(10).due(1000, 1.0, rng())) < 1000
    assert len(OpenLoop(10).due(None, None, rng())) == 32
    assert ClosedLoop(2).due(5, None, rng()) == [0.0] * 5
    assert len(ClosedLoop(2).due(None, 1.0, rng())) == 32


class Recorder:
    """A `send` that takes some turns of the event loop."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, index: int, started: float) -> None:
        self.sent.append(index)
        self.times.append(started)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for _ in range(1 + index % 3):
            await asyncio.sleep(0)
        self.at_once -= 1


def test_a_closed_loop_sends_each_request_once_and_in_order() -> None:
    send = Recorder()
    asyncio.run(ClosedLoop(3).drive(send, [0.0] * 20, None))
    assert send.sent == list(range(20))
    assert send.most_at_once == 3


def test_a_closed_loop_sends_nothing_after_its_duration() -> None:
    send = Recorder()
    asyncio.run(ClosedLoop(1).drive(send, [0.0] * 1_000_000, 0.05))
    assert 0 < len(send.sent) < 1_000_000


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def drive() -> tuple[list[int], list[float]]:
        sent: list[int] = []
        times: list[float] = []
        all_sent = asyncio.Event()

        async def send(index: int, started: float) -> None:
            sent.append(index)
            times.append(started)
            if len(sent) == 10:
                all_sent.set()
            await all_sent.wait()  # no answer before the last request

        await OpenLoop(1000).drive(send, [index / 1000 for index in range(10)], None)
        return sent, times

    sent, times = asyncio.run(drive())
    assert sent == list(range(10))
    # Latencies count from the schedule, not from when the event loop got round to it.
    assert np.diff(times) == pytest.approx([0.001] * 9)
