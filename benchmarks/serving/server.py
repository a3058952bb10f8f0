"""A served engine as a process of its own, and what the benchmarks ask of it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """text; seconds at which pieces of it came (time.perf_counter), usage, finish reason."""

    text: str
    times: tuple[float, ...]
    began: float
    usage: dict[str, Any]
    finish_reason: str | None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.began

    @property
    def tpot(self) -> float:
        """Seconds a token after the first, by the server's count of tokens."""
        return (self.times[-1] - self.times[0]) / max(self.usage["completion_tokens"] - 1, 1)


class Server:
    """A running `glmcompile serve`; `ready_seconds` from its start to the first /ready."""

    def __init__(self, process: subprocess.Popen[str], url: str, ready_seconds: float) -> None:
        self.process, self.url, self.ready_seconds = process, url, ready_seconds

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer."""
        connection = self.connect()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def connect(self) -> HTTPConnection:
        address = urlsplit(self.url)
        assert address.hostname is not None
        return HTTPConnection(address.hostname, address.port, timeout=600)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        found = re.findall(
            rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.M
        )
        if not found:
            raise KeyError(f"the server has no metric {name}")
        return sum(map(float, found))

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024 / 1e6

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").split()
        return (int(fields[13]) + int(fields[14])) / 100


@contextlib.contextmanager
def served(engine: Path, *options: str) -> Iterator[Server]:
    """A server on a free port, told to stop at the end. Raises RuntimeError if it never starts."""
    command = [sys.executable, "-m", "glmcompile", "serve", str(engine), "--port", "0", *options]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
        server = Server(process, found[0], 0.0)
        while True:
            with contextlib.suppress(urllib.error.URLError):
                server.get("/ready")
                break
            time.sleep(0.01)
        server.ready_seconds = time.perf_counter() - began
        yield server
    finally:
        process.terminate()
        process.wait(60)


def stream(server: Server, body: dict[str, Any], stop: threading.Event | None = None) -> Answer:
    """Ask for a streamed chat completion and note when its pieces arrive.

    stop: once it is set, the connection is closed at the next piece.
    """
    wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
    connection = server.connect()
    try:
        began = time.perf_counter()
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(wanted).encode(),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read()[:300]!r}")
        text, times, usage, reason = "", [], {}, None
        for line in response:
            if stop is not None and stop.is_set():
                break
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                usage = chunk["usage"]
            for choice in chunk.get("choices", ()):
                times.append(time.perf_counter())
                text += choice["delta"].get("content") or ""
                reason = choice.get("finish_reason") or reason
        return Answer(text, tuple(times), began, usage, reason)
    finally:
        connection.close()
