"""A compile as a process of its own, with its memory and disk sampled while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Watched:
    """`glmcompile compile`, running.

    samples: seconds, resident GB, GB on disk, last stage that is done. peak, disk: the most bytes
    of memory (VmHWM, mapped pages included) and of disk.
    """

    def __init__(
        self,
        source: Path,
        engine: Path,
        log: Path,
        options: Sequence[str] = (),
        python: str | Path = sys.executable,
    ) -> None:
        """python: the interpreter, of an environment that has glmcompile."""
        self._store = engine.parent / f".{engine.name}.compile"
        self._engine = engine
        self.samples: list[list[Any]] = []
        self.peak = self.disk = 0
        self._began = time.monotonic()
        with log.open("ab") as file:
            command = [str(python), "-m", "glmcompile", "compile", str(source)]
            self._process = subprocess.Popen(
                [*command, "-o", str(engine), *options],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code; None where it was killed after so many seconds."""
        while self._process.poll() is None:
            self._sample()
            if seconds is not None and self.seconds > seconds:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                return None
            threading.Event().wait(0.5)
        return self._process.returncode

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def stage(self) -> str:
        """The last stage that the journal has."""
        try:
            lines = (self._store / "journal.jsonl").read_text().splitlines()
        except OSError:
            return ""
        return json.loads(lines[-1]).get("stage", "") if lines else ""

    def _sample(self) -> None:
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmHWM" not in fields:
            return
        resident = int(fields["VmRSS"].split()[0]) * 1024
        self.peak = max(self.peak, int(fields["VmHWM"].split()[0]) * 1024)
        disk = bytes_below(self._store) + bytes_below(self._engine)
        self.disk = max(self.disk, disk)
        row = [round(self.seconds, 1), round(resident / 1e9, 3), round(disk / 1e9, 3)]
        self.samples.append([*row, self.stage().partition("/")[0]])


def bytes_below(path: Path) -> int:
    """Bytes on disk below a folder."""
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.stat(os.path.join(folder, file)).st_blocks * 512
            except OSError:  # removed meanwhile
                continue
    return total
