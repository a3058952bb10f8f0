"""JSON lines between run.py and the workers, both ends.

A call is `{"call": name, "arguments": {...}}`, its answer `{"result": ...}` or `{"error": text}`.
This file is all that a worker shares with the project, and needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Of the longest call: a conversion, or an answer in float32 to a screenshot.
TIMEOUT_SECONDS = 1800


def serve(worker: Any) -> None:
    """Answer calls with the methods of `worker` until standard input ends.

    What libraries print goes to standard error; the answers have standard output to themselves.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            method = installed if call["call"] == "installed" else getattr(worker, call["call"])
            answer = {"result": method(**call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def installed() -> dict[str, str]:
    """Name and version of every package of this environment."""
    return dict(sorted((package.name, package.version) for package in distributions()))


def run_tool(command: Sequence[str]) -> None:
    """Run a peer's own command. Raises RuntimeError with the last line of what it printed."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, file=sys.stderr)
    if run.returncode != 0:
        last = (run.stdout.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command[:3])}: {last}")


def sees(checkpoint: str) -> bool:
    """Whether a checkpoint has a vision encoder."""
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    return "vision_config" in config


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


class WorkerError(Exception):
    """A worker's own message, or the last words of one that died."""


class Worker:
    """A worker process; the methods of its peer are called with `call`."""

    def __init__(
        self, python: Path, script: Path, log: Path, variables: dict[str, str] | None = None
    ) -> None:
        """log: receives what the process prints, at its end."""
        self._log = log
        with log.open("a", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **(variables or {})},
                text=True,
                # A group of its own, so that its children are stopped and ended with it.
                start_new_session=True,
            )

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Run a method. Raises WorkerError if it fails, dies or takes longer than allowed."""
        timeout = threading.Timer(TIMEOUT_SECONDS, self._signal, [signal.SIGKILL])
        timeout.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timeout.cancel()
        if not line:
            raise WorkerError(self._last_words(name))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def pause(self) -> None:
        """Stop the process and its children, thread pools that spin included."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may have ended already
            os.killpg(self._process.pid, number)

    def _last_words(self, name: str) -> str:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return " | ".join([f"ended during {name} ({cause})", *lines[-3:]])
