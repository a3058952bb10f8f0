"""The access log: one line of JSON per request, written beside the server, never in its way."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from glmcompile.errors import InputError

# Lines that wait while the disk is slow; further ones are dropped.
_MOST_LINES = 10_000


class AccessLog:
    """Lines go through a bounded queue to a thread of their own.

    A line that cannot be written, for a full disk or a reader that is gone, is dropped; the next
    one that can be says how many were.
    """

    def __init__(self, target: Path | str) -> None:
        """target: a file that is appended to, or "-" for stderr.

        Raises InputError for a file that cannot be opened.
        """
        self._own = str(target) != "-"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = os.open(target, flags, 0o644) if self._own else sys.stderr.fileno()
        except OSError as error:
            raise InputError(
                f"{target}: the access log cannot be opened ({error.strerror}); choose another"
            ) from error
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_LINES)
        # Dropped lines, each count changed by one thread alone; `_told` of them are in the log.
        self._refused, self._failed, self._told = 0, 0, 0
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        """Never blocks and never raises."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._refused += 1

    def close(self) -> None:
        """Write what waits, for a second at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(timeout=1)

    def _write(self) -> None:
        while (record := self._lines.get()) is not None:
            dropped = self._refused + self._failed - self._told
            if dropped:
                record = {**record, "dropped_before": dropped}
            try:
                os.write(self._file, json.dumps(record).encode() + b"\n")
                self._told += dropped
            except OSError:
                self._failed += 1
        if self._own:
            os.close(self._file)
