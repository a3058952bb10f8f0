"""A load test: a server, a workload, and a level of load after the other."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmcompile.bench import machine
from glmcompile.bench.load.answer import Answer, RequestError
from glmcompile.bench.load.client import ServerClient
from glmcompile.bench.load.loops import ClosedLoop, Loop
from glmcompile.bench.load.summary import Outcome, summarize
from glmcompile.bench.load.workload import Composer, Workload, generator
from glmcompile.progress import Progress, Silent

_LONGEST_PAUSE = 60.0  # seconds before a retry, whatever the server asks for
_RETRIED = (408, 409, 429)  # and 500 and above, as OpenAI's client does


@dataclass(frozen=True)
class LoadTest:
    """What to measure.

    model: None takes the server's first. requests: of each level; duration: seconds after which a
    level sends no more; an open loop with a duration alone takes as many as arrive, anything else
    32 by default. warmup: requests before each level that do not count, by as many clients as the
    level has. seed: None takes a new one, so that no cache of the server knows the prompts.
    timeout: seconds for a request. retries: of a request that met an overloaded or failing server.
    slo: see summarize.
    """

    url: str
    loops: Sequence[Loop] = (ClosedLoop(1),)
    workload: Workload = field(default_factory=Workload)
    model: str | None = None
    api_key: str | None = None
    requests: int | None = None
    duration: float | None = None
    warmup: int = 2
    seed: int | None = None
    timeout: float = 600.0
    retries: int = 0
    slo: dict[str, float] | None = None


def run(test: LoadTest, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every level in turn; the result is JSON-serialisable.

    Ctrl-C and a polite kill end it early: the result then has `interrupted` and what was measured
    so far. Raises KeyboardInterrupt if that is nothing, InputError as ServerClient does.
    """
    seed = secrets.randbits(31) if test.seed is None else test.seed
    result = asyncio.run(_Run(test, seed, progress or Silent()).measure())
    if not result["levels"]:
        raise KeyboardInterrupt
    return result


class _Run:
    """One load test under way."""

    def __init__(self, test: LoadTest, seed: int, progress: Progress) -> None:
        self._test, self._seed, self._progress = test, seed, progress
        self._levels: list[dict[str, Any]] = []
        self._composed = 0  # requests so far; each has an index of its own

    async def measure(self) -> dict[str, Any]:
        test = self._test
        described = machine.host(("glmcompile", "numpy", "aiohttp"))
        server: dict[str, Any] = {}
        interrupted = False
        with _cancelled_by_signals():
            try:
                async with ServerClient(test.url, test.api_key, test.timeout) as client:
                    server, composer = await self._meet(client)
                    for loop in test.loops:
                        await self._level(client, composer, loop)
            except asyncio.CancelledError:
                interrupted = True
        return {
            "server": server,
            "workload": {
                **test.workload.describe(),
                "seed": self._seed,
                "warmup": test.warmup,
                "timeout_s": test.timeout,
                "retries": test.retries,
            },
            "slo_ms": test.slo,
            "levels": self._levels,
            "interrupted": interrupted,
            "machine": described,
        }

    async def _meet(self, client: ServerClient) -> tuple[dict[str, Any], Composer]:
        self._progress.stage("ask the server")
        workload = self._test.workload
        server = await client.describe(self._test.model)
        fields = {"ignore_eos": True} if workload.ignore_eos else {}
        limit, per_word = await client.probe(server["model"], fields, self._seed)
        return server, Composer(workload, server["model"], limit, self._seed, per_word)

    async def _level(self, client: ServerClient, composer: Composer, loop: Loop) -> None:
        """Measure one level; what a cancellation leaves of it is kept."""
        test = self._test
        rng = generator(self._seed, "arrivals", self._composed)
        due = loop.due(test.requests, test.duration, rng)
        bodies = await self._compose(composer, test.warmup + len(due))
        warmup, counted = bodies[: test.warmup], bodies[test.warmup :]
        if warmup:
            self._progress.stage(f"warm up for {loop.title}")
            clients = loop.concurrency if isinstance(loop, ClosedLoop) else 1
            sender = _Sender(client, warmup, test.retries)
            await ClosedLoop(clients).drive(sender.send, [0.0] * len(warmup), None)
        sender = _Sender(client, counted, test.retries)
        shown = asyncio.create_task(self._show(loop, sender, test.duration))
        began, cpu = time.perf_counter(), time.process_time()
        try:
            await loop.drive(sender.send, due, test.duration)
        finally:
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            shown.cancel()
            if sender.outcomes:
                self._levels.append(
                    {
                        "load": {loop.unit: loop.value},
                        "title": loop.title,
                        "unfinished": sender.sent - len(sender.outcomes),
                        # Above half a core, this client disturbs a server on the same machine.
                        "client_cpu_percent": 100 * cpu / seconds,
                        **summarize(sender.outcomes, seconds, test.slo),
                    }
                )

    async def _compose(self, composer: Composer, count: int) -> list[bytes]:
        done = self._progress.stage(f"prepare {count} requests", count)
        bodies = []
        for made in range(count):
            bodies.append(composer.compose(self._composed))
            self._composed += 1
            done(made + 1)
            await asyncio.sleep(0)  # where a cancellation arrives
        return bodies

    async def _show(self, loop: Loop, sender: _Sender, duration: float | None) -> None:
        """Twice a second, so that showing takes no time from measuring."""
        began, total = time.perf_counter(), len(sender.bodies)
        done = self._progress.stage(f"{loop.title}, up to {total} requests", 1000)
        while True:
            answered = len(sender.outcomes) / max(total, 1)
            passed = (time.perf_counter() - began) / duration if duration else 0.0
            done(round(1000 * min(1.0, max(answered, passed))))
            await asyncio.sleep(0.5)


class _Sender:
    """Sends prepared requests and keeps what became of them."""

    def __init__(self, client: ServerClient, bodies: Sequence[bytes], retries: int) -> None:
        self.bodies = bodies
        self.outcomes: list[Outcome] = []
        self.sent = 0
        self._client, self._retries = client, retries

    async def send(self, index: int, started: float) -> None:
        """Send request `index`, again after a failure that may pass; see Outcome."""
        self.sent += 1
        retries = 0
        while True:
            result = await self._attempt(self.bodies[index])
            if retries == self._retries or not _may_pass(result):
                self.outcomes.append(Outcome(started, result, retries))
                return
            assert isinstance(result, RequestError)
            pause = result.retry_after if result.retry_after is not None else 0.5 * 2**retries
            await asyncio.sleep(min(pause, _LONGEST_PAUSE))
            retries += 1

    async def _attempt(self, body: bytes) -> Answer | RequestError:
        try:
            return await self._client.stream(body)
        except RequestError as error:
            return error


def _may_pass(result: Answer | RequestError) -> bool:
    if isinstance(result, Answer):
        return False
    if result.status is None:
        return result.kind == "connection"
    return result.status in _RETRIED or result.status >= 500


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM cancel the task that is running, unless they are ignored.

    An exception raised wherever the event loop happens to be would lose what was measured.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            handlers[number] = handler
            loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
