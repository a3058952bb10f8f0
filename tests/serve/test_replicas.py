"""Two replicas under load: one is killed, one process is told to stop, conversations stay put."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines import TinyEngine
from tests.serve.servers import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray, of the extra replicas, is missing"
    ),
]
_RETRY_SECONDS = 0.5


class Replicated:
    """`glmcompile serve --replicas 2` as a process."""

    def __init__(self, engine: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "glmcompile", "serve", str(engine), "--port", "0"),
                    *("--replicas", "2", "--threads", "1", "--kv-cache-memory", "8MiB"),
                    *("--served-model-name", "tiny"),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while not (found := re.search(r"serving tiny at (\S+)", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        self.url = found[1]

    def replicas(self) -> set[int]:
        """Process ids of the replicas, which are descendants of the server."""
        parents, names = {}, {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                names[int(process.name)] = (process / "cmdline").read_bytes()
                parents[int(process.name)] = int(fields[1])
            except OSError:  # it has ended
                continue

        def ours(id: int) -> bool:
            return id == self.process.pid or (id in parents and ours(parents[id]))

        return {
            id for id, name in names.items() if b":ServeReplica:glmcompile" in name and ours(id)
        }

    def engines(self) -> set[str]:
        return set(re.findall(r'num_requests_running{engine="(\d)"', self.get("/metrics").text))

    def prompt_tokens(self) -> dict[str, float]:
        found = re.findall(
            r'vllm:prompt_tokens_total{engine="(\d)".*} (\S+)', self.get("/metrics").text
        )
        return {engine: float(value) for engine, value in found}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def chat(self, prompt: str, **options: Any) -> httpx.Response:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            **{"max_tokens": 12, "temperature": 0},
            **options,
        }
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def streamed(self, prompt: str, **options: Any) -> str:
        """The text of a streamed answer. Raises HTTPError for one that is not whole."""
        response = self.chat(prompt, stream=True, **options)
        response.raise_for_status()
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            raise httpx.ReadError(lines[-1])
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def started(
    tiny_engine: Callable[[str], TinyEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicated]:
    log = tmp_path_factory.mktemp("replicas") / "log"
    server = Replicated(tiny_engine("glm4v").path, log)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def test_the_front_answers_as_one_server(started: Replicated) -> None:
    assert started.get("/health").status_code == 200
    assert started.get("/ready").status_code == 200
    assert started.get("/v1/models").json()["data"][0]["id"] == "tiny"
    wait_for(lambda: started.engines() == {"0", "1"})
    assert started.get("/metrics").text.count("# TYPE vllm:num_requests_running gauge") == 1
    refused = started.chat("Hi", temperature=-1)
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["message"]
    given = httpx.get(f"{started.url}/v1/models", headers={"x-request-id": "mine"})
    assert given.headers["x-request-id"] == "mine"
    whole = started.chat("Hi").json()["choices"][0]["message"]["content"]
    assert started.streamed("Hi") == whole


def test_a_conversation_stays_with_its_replica(started: Replicated) -> None:
    before = started.prompt_tokens()
    turns = [{"role": "user", "content": "Open the settings of the phone. " * 4}]
    for _ in range(3):
        answer = started.chat("", messages=turns).json()
        turns += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        turns[-2] = {"role": "assistant", "content": turns[-2]["content"]}
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    after = started.prompt_tokens()
    assert sum(after[engine] > before[engine] for engine in before) == 1


def test_no_request_fails_after_a_retry_when_a_replica_is_killed(started: Replicated) -> None:
    prompts = [f"Prompt number {number}" for number in range(8)]
    expected = {prompt: started.streamed(prompt) for prompt in prompts}
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    over = threading.Event()

    def client(place: int) -> None:
        turn = place
        while not over.is_set():
            turn += 1
            prompt = prompts[turn % len(prompts)]
            for attempt in range(2):
                try:
                    if turn % 2:
                        text = started.streamed(prompt)
                    else:
                        response = started.chat(prompt)
                        response.raise_for_status()
                        text = response.json()["choices"][0]["message"]["content"]
                    counts["answered"] += 1
                    if text != expected[prompt]:
                        wrong.append(f"{prompt}: {text!r}, not {expected[prompt]!r}")
                    break
                except httpx.HTTPError as error:
                    counts["retried" if attempt == 0 else "failed"] += 1
                    if attempt:
                        wrong.append(f"{prompt}: {error!r}")
                    time.sleep(_RETRY_SECONDS)

    clients = [threading.Thread(target=client, args=(place,)) for place in range(6)]
    for thread in clients:
        thread.start()
    try:
        wait_for(lambda: counts["answered"] > 50)
        before = started.replicas()
        assert len(before) == 2
        killed = before.pop()
        begun = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(started.replicas() - {killed}) == 2 and len(started.engines()) == 2)
        back = time.monotonic() - begun
        since = counts["answered"]
        wait_for(lambda: counts["answered"] > since + 50)
    finally:
        over.set()
        for thread in clients:
            thread.join()
    print(f"back after {back:.1f} s; {dict(counts)}")
    assert wrong == []
    assert before < started.replicas()  # the other one is the same process still


def test_sigterm_finishes_what_runs(started: Replicated) -> None:
    body = {
        "messages": [{"role": "user", "content": "Count"}],
        **{"max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True},
    }
    url = f"{started.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        started.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert first.startswith("data: ")
    assert '"finish_reason":"length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert started.process.wait(60) == 0
    assert started.replicas() == set()
