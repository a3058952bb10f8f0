"""Stages of long work on the terminal, and the signals that end it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any


class Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt that can be handled wherever it was raised.

    Once KeyboardInterrupt itself has come out of `eval` or `exec` of a string, as torch and
    transformers use them, CPython ends the process by SIGINT in place of its exit code.
    """


class TerminalProgress:
    """Stages of long work as rich progress bars on stderr.

    A polite kill unwinds like Ctrl-C, so that half-written output is removed. Libraries swallow an
    exception now and then (in a finalizer, in a callback from C), so it is raised again at the next
    stage.
    """

    def __init__(self, *, time_left: bool = False) -> None:
        """time_left: show it beside the time passed, and draw seldom, as measuring asks for."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn()] if time_left else []),
            console=Console(stderr=True),
            refresh_per_second=2 if time_left else 10,
            speed_estimate_period=600,  # of one step of long work many take a minute
        )
        self._task: Any = None
        self._name = ""
        self._expected: dict[str, float] = {}
        self._all: Any = None
        self._passed = self._skipped = 0.0  # seconds expected of what is done; by an earlier run
        self._interrupted = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> TerminalProgress:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # as nohup and shells' & set it
                self._handlers[number] = handler
                signal.signal(number, self._interrupt)
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def stage(self, name: str, total: int | None = None, done: int = 0) -> Callable[[int], None]:
        """See glmcompile.progress.Progress."""
        if self._interrupted:
            raise Interrupt
        self._finish()
        self._name = name
        task = self._task = self._bars.add_task(name, total=total, completed=done)
        step = self._expected.get(name, 0.0) / total if total else 0.0
        self._skipped += done * step

        def advance(done: int) -> None:
            self._bars.update(task, completed=done)
            self._pass(done * step)

        self._pass(done * step)
        return advance

    def expect(self, seconds: Mapping[str, float]) -> None:
        """See glmcompile.progress.Progress."""
        self._expected = dict(seconds)
        self._all = self._bars.add_task("All stages", total=sum(seconds.values()))

    def note(self, sentence: str) -> None:
        """See glmcompile.progress.Progress."""
        self._bars.console.print(f"note: {sentence}", markup=False, highlight=False, soft_wrap=True)

    def _pass(self, part: float) -> None:
        """part: of the stage that runs, in the seconds expected of it."""
        if self._all is None:
            return
        # What an earlier run did says nothing of this one's speed: it is left out of both.
        done, total = self._passed + part - self._skipped, sum(self._expected.values())
        self._bars.update(self._all, completed=done, total=total - self._skipped)

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise Interrupt

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)
            self._passed += self._expected.get(self._name, 0.0)
            self._pass(0.0)
