"""`glmcompile serve` as a process: its start, signals, exit codes, logs and idle time."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

from glmcompile.cli import main
from tests.serve.requests import CHAT, LONG, SCREEN, chat
from tests.serve.servers import wait_for

PATIENCE = 60


@contextmanager
def process(engine: Path, *options: object, **environment: str) -> Iterator[Any]:
    """The process, with its `url` once it is ready."""
    command = [sys.executable, "-m", "glmcompile", "serve", engine, "--port", 0, *options]
    running: Any = subprocess.Popen(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with running:
        try:
            line = running.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, running.stderr.read()
            running.url = found[0]
            yield running
        finally:
            running.kill()


def ended(running: Any) -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = running.communicate(timeout=PATIENCE)
    return running.returncode, errors


def post(running: Any, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{CHAT}", json=body, timeout=PATIENCE, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_well(
    reference_engine: Path, number: signal.Signals
) -> None:
    with process(reference_engine, "--fault", "decoder:20ms") as running:
        answers: list[httpx.Response] = []
        request = chat(max_tokens=40, **LONG)
        client = threading.Thread(target=lambda: answers.append(post(running, request)))
        client.start()
        wait_for(lambda: "num_requests_running" in metrics(running) and is_busy(running))
        running.send_signal(number)
        assert ended(running) == (0, "")
        client.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 40


def test_a_second_signal_ends_at_once(reference_engine: Path) -> None:
    with process(reference_engine, "--fault", "decoder:20ms") as running:
        request = chat(max_tokens=3000, stream=True, **LONG)
        with httpx.stream("POST", f"{running.url}{CHAT}", json=request, timeout=PATIENCE) as lines:
            stream = lines.iter_lines()
            next(stream)
            running.send_signal(signal.SIGINT)
            wait_for(lambda: httpx.get(f"{running.url}/ready").status_code == 503)
            running.send_signal(signal.SIGINT)
            assert ended(running)[0] == 130


def test_an_idle_server_needs_no_processor(reference_engine: Path) -> None:
    """After work, too: nothing polls. One wake-up in two seconds would be allowed."""
    with process(reference_engine) as running:
        assert post(running, chat()).status_code == 200
        it = psutil.Process(running.pid)
        wait_for(lambda: not is_busy(running))
        httpx.get(f"{running.url}/health")
        before, switches = sum(it.cpu_times()[:2]), it.num_ctx_switches().voluntary
        threading.Event().wait(2)
        assert sum(it.cpu_times()[:2]) - before <= 0.02
        assert it.num_ctx_switches().voluntary - switches <= 4


def test_the_access_log_has_a_line_of_json_for_each_request(
    reference_engine: Path, tmp_path: Path
) -> None:
    file = tmp_path / "access.log"
    with process(reference_engine, "--access-log", file) as running:
        post(running, chat(), headers={"x-request-id": "first"})
        post(running, chat(top_p=3), headers={"x-request-id": "second"})
        httpx.get(f"{running.url}/health")
        running.terminate()
        assert ended(running) == (0, "")
    first, second = map(json.loads, file.read_text().splitlines())
    assert first["request_id"] == "first"
    assert first["path"] == CHAT
    assert first["status"] == 200
    assert first["prompt_tokens"] == 9
    assert first["completion_tokens"] > 0
    assert 0 < first["ttft"] <= first["seconds"]
    assert second["request_id"] == "second"
    assert second["status"] == 400
    assert "completion_tokens" not in second


def test_a_log_that_cannot_be_written_fails_no_request(reference_engine: Path) -> None:
    with process(reference_engine, "--access-log", "/dev/full") as running:
        for _ in range(3):
            assert post(running, chat()).status_code == 200
        running.terminate()
        assert ended(running) == (0, "")


def test_a_log_on_a_closed_pipe_fails_no_request(reference_engine: Path) -> None:
    with process(reference_engine, "--access-log", "-") as running:
        assert post(running, chat()).status_code == 200
        assert json.loads(running.stderr.readline())["status"] == 200
        running.stderr.close()
        for _ in range(3):
            assert post(running, chat()).status_code == 200
        running.terminate()
        assert running.wait(PATIENCE) == 0


def test_the_key_may_come_from_the_environment(reference_engine: Path) -> None:
    with process(reference_engine, GLMCOMPILE_API_KEY="secret") as running:
        assert post(running, chat()).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert post(running, chat(), headers=headers).status_code == 200


def test_options_reach_engine_and_policy(reference_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "screen.png").write_bytes(SCREEN.read_bytes())
    options = {
        "--served-model-name": "phone",
        "--max-model-len": 200,
        "--limit-images": 1,
        "--max-pixels": 50_000,
        "--allowed-media-path": tmp_path,
        "--max-queue": 3,
    }
    flat = [each for option in options.items() for each in option]
    with process(reference_engine, *flat) as running:
        model = httpx.get(f"{running.url}/v1/models").json()["data"][0]
        assert model["id"] == "phone"
        assert model["max_model_len"] == 200

        def ask(*urls: str) -> httpx.Response:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            return post(running, chat(messages=[{"role": "user", "content": parts}]))

        own = f"file://{tmp_path}/screen.png"
        assert ask(own).status_code == 200
        assert "1" in ask(own, own).json()["error"]["message"]
        assert ask(f"file://{SCREEN.resolve()}").status_code == 400
        assert ask(f"file://{tmp_path}/../passwd").status_code == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", "{taken}"), ("{taken}", "in use")),
        (("--host", "no.such.host.invalid"), ("no.such.host.invalid",)),
        (("--access-log", "/no/such/folder/log"), ("/no/such/folder/log",)),
        (("--max-model-len", 10**6), ("max_model_len", "4096")),
        (("--api-key", ""), ("api_key",)),
        (("--kv-cache-memory", "much"), ("much", "4GiB")),
        (("--fault", "printer:error"), ("printer",)),
    ],
)
def test_a_server_that_cannot_start_says_why(
    reference_engine: Path, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        filled = [str(each).format(taken=taken) for each in options]
        result = CliRunner().invoke(main, ["serve", str(reference_engine), *filled])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word.format(taken=taken) in result.stderr


def test_a_folder_without_an_engine_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr


def metrics(running: Any) -> str:
    return httpx.get(f"{running.url}/metrics").text


def is_busy(running: Any) -> bool:
    return re.search(r"num_requests_running\S+ 1\.0", metrics(running)) is not None
