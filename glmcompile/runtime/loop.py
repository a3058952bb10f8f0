"""The engine's loop: one thread that steps the core, reached through a mailbox."""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from glmcompile.errors import ClosedError, OverloadedError
from glmcompile.runtime.core import EngineCore
from glmcompile.runtime.request import Request, RequestOutput
from glmcompile.runtime.stats import EngineStats, Observer

Deliver = Callable[[RequestOutput], None]
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# Of an engine that is unwell and gets no requests any more: how long until it tries itself.
_PROBE_SECONDS = 1.0


class EngineLoop:
    """Steps while there is work; whoever submits, cancels or asks may be on any thread.

    The mailbox is a SimpleQueue, whose `put` may interrupt itself: a stream that the garbage
    collector drops cancels its request, wherever that happens.
    """

    def __init__(
        self,
        core: EngineCore,
        capacity: int,
        probe: Callable[[], Request],
        observer: Observer | None = None,
    ) -> None:
        """capacity: requests that may be unfinished at once, waiting ones included.

        probe: makes a request that tells whether the engine computes again.
        """
        self._core, self._capacity = core, capacity
        self._probe, self._observer = probe, observer
        self._mailbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the next three
        self._unfinished = 0
        self._open = True
        self._finished_at: list[float] = []  # the last few, for an estimate
        self._ids = itertools.count()
        self._deliver: dict[int, Deliver] = {}  # the stepping thread's
        self._stop = False
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._main, name="glmcompile-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a prepared request and return its id.

        deliver: called on the stepping thread with each output; must be quick and not raise.
        Raises OverloadedError when too many requests are unfinished, ClosedError after `drain`.
        """
        with self._lock:
            self._check_room()
            self._unfinished += 1
        request.sequence.id = next(self._ids)

        def add() -> None:
            self._deliver[request.sequence.id] = deliver
            self._core.add(request)

        self._mailbox.put(add)
        return request.sequence.id

    def check_room(self) -> None:
        """Raises what `submit` would raise now."""
        with self._lock:
            self._check_room()

    def cancel(self, id: int) -> None:
        """End a request before the next step, with what it has; finished ids are ignored."""
        self._mailbox.put(lambda: self._core.cancel(id))

    def wake(self) -> None:
        """Have the loop look at the encoder."""
        self._mailbox.put(lambda: None)

    def call(self, function: Callable[[EngineCore], Result]) -> Result:
        """function(core) between two steps, on the stepping thread; raises what it raises."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._core))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if not self._thread.is_alive():
                raise ClosedError("the engine is closed; load it again")
            self._mailbox.put(run)
        return future.result()

    def stats(self) -> EngineStats:
        """From any thread."""
        core, counters = self._core, self._core.counters
        running = len(core.scheduler.running)
        with self._lock:
            unfinished = self._unfinished
        blocks = core.blocks
        return EngineStats(
            running=running,
            waiting=max(unfinished - running, 0),
            kv_cache_usage=1 - blocks.num_free_blocks / blocks.num_blocks,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_cache_queries=counters.prompt_tokens,
            prefix_cache_hits=counters.cached_tokens,
            encoder_cache_queries=counters.encoder_cache_queries,
            encoder_cache_hits=counters.encoder_cache_hits,
            encoder_cache_bytes=core.encoder_cache.num_bytes,
            encoded_images=counters.encoded_images,
            steps=counters.steps,
            failed_steps=counters.failed_steps,
            healthy=core.healthy,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no further requests and wait for the others; False when the time ran out first."""
        with self._lock:
            self._open = False
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout)

    def close(self) -> None:
        """Stop after the step in work; what is unfinished ends with a ClosedError."""
        with self._lock:
            self._open = False

        def stop() -> None:
            self._stop = True

        self._mailbox.put(stop)
        self._thread.join()

    def _main(self) -> None:
        while not self._stop:
            self._receive()
            if not self._core.has_work or self._core.is_blocked:
                continue
            try:
                outputs = self._core.step()
                self._observe(self._core.last_step)
            except Exception as error:  # in the core itself: no request is to blame, none can go on
                _log.exception("a step of the engine failed")
                outputs = self._core.abort(error)
            self._hand_out(outputs)
        self._hand_out(self._core.abort(ClosedError("the engine was closed")))
        self._core.close()

    def _receive(self) -> None:
        """Do what the mailbox asks for; wait for it when there is nothing else to do."""
        busy = self._core.has_work and not self._core.is_blocked
        unwell = not self._core.has_work and not self._core.healthy
        try:
            message = self._mailbox.get(not busy, _PROBE_SECONDS if unwell else None)
        except queue.Empty:
            if unwell:
                self._try_itself()
            return
        while True:
            try:
                message()
            except Exception:  # whoever sent it, the thread has to go on
                _log.exception("a message to the engine failed")
            try:
                message = self._mailbox.get_nowait()
            except queue.Empty:
                return

    def _try_itself(self) -> None:
        """Compute something that nobody asked for, to see whether it works again."""
        try:
            request = self._probe()
        except ClosedError:
            return
        request.sequence.id = next(self._ids)
        self._core.add(request)

    def _observe(self, step: tuple[int, float]) -> None:
        if self._observer is not None and step[0]:
            self._observer.on_step(*step)

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        """Give outputs to those who wait for them."""
        finished = 0
        for output in outputs:
            deliver = self._deliver.get(output.id)
            if deliver is None:  # a probe's
                continue
            if output.finished:
                finished += 1
                del self._deliver[output.id]
                if self._observer is not None and output.completion is not None:
                    self._observer.on_finished(output.completion)
            try:
                deliver(output)
            except Exception:
                _log.exception("an output could not be delivered")
        if finished:
            with self._lock:
                self._unfinished -= finished
                self._finished_at += [time.monotonic()] * finished
                del self._finished_at[:-16]
                self._idle.notify_all()

    def _check_room(self) -> None:
        """With the lock held."""
        if not self._open:
            raise ClosedError("the engine is closing and takes no further requests")
        if self._unfinished >= self._capacity:
            raise OverloadedError(
                f"{self._unfinished} requests are unfinished and no more than "
                f"{self._capacity} may be; try again later",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        """Seconds in which about one request finishes, by those that finished last."""
        times = self._finished_at
        if len(times) < 2:
            return 1.0
        return float(min(max(math.ceil((times[-1] - times[0]) / (len(times) - 1)), 1), 60))
