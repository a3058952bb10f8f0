"""`glmcompile bench --url`: its files, its errors, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from glmcompile.cli import main
from tests.bench.load.scripted import Script, ScriptedServer


def bench(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], **options)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_the_table_and_the_files(tmp_path: Path) -> None:
    files = {name: tmp_path / f"load.{name}" for name in ("json", "markdown", "plot")}
    options = [each for name, file in files.items() for each in (f"--{name}", file)]
    with ScriptedServer(lambda number, body: Script(status=500 if number == 3 else 200)) as server:
        result = bench(
            *("--url", server.url, "--concurrency", "1,2", "--rate", "500", "--requests", 4),
            *("--output-tokens", "2-4", "--slo", "ttft=60000,tpot=60000", "--warmup", 0),
            *options,
        )
    assert result.exit_code == 0, result.output
    figures = json.loads(files["json"].read_text())
    assert [level["requests"] for level in figures["levels"]] == [4, 4, 4]
    assert figures["slo_ms"] == {"ttft": 60000, "tpot": 60000}
    assert figures["levels"][0]["errors"]["HTTP 500"]["count"] == 1
    markdown = files["markdown"].read_text()
    for text in (result.stdout, markdown):
        for word in ("1 client", "2 clients", "500 requests/s", "TTFT p99 (ms)", "goodput"):
            assert word in text
        assert "HTTP 500" in text
    assert "| failed | 1 | 0 | 0 |" in markdown
    with Image.open(files["plot"]) as picture:
        assert picture.format == "PNG"


def test_a_load_in_which_all_fails_still_draws(tmp_path: Path) -> None:
    with ScriptedServer(lambda number, body: Script(status=500)) as server:
        result = bench("--url", server.url, "--requests", 2, "--plot", tmp_path / "load.png")
    assert result.exit_code == 0, result.output
    assert "500" in result.stdout


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Open Chat."}]
    file.write_text(json.dumps(messages) + "\n")
    with ScriptedServer() as server:
        result = bench("--url", server.url, "--prompts", file, "--requests", 2)
        assert result.exit_code == 0, result.output
        refused(bench("--url", server.url, "--prompts", file, "--image", "8x8"), "--image")
    assert all(body["messages"] == messages for body in server.bodies)


def test_the_key_comes_from_the_environment() -> None:
    with ScriptedServer(api_key="secret") as server:
        result = bench("--url", server.url, "--requests", 1, env={"OPENAI_API_KEY": "secret"})
        assert result.exit_code == 0, result.output
        refused(bench("--url", server.url, env={"OPENAI_API_KEY": "other"}), "API key")
    assert "secret" not in result.output


def test_an_engine_or_a_server_is_measured() -> None:
    refused(bench(), "ENGINE", "--url")
    refused(bench("e.engine", "--url", "http://host"), "e.engine", "http://host")
    refused(bench("--url", "http://host", "--baseline", "b"), "--baseline", "http://host")
    refused(bench("e.engine", "--rate", "1", "--retries", "1"), "--rate, --retries", "e.engine")


def test_no_server_there_is_refused() -> None:
    with ScriptedServer() as server:
        pass
    refused(bench("--url", server.url), server.url, "no server answers")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--concurrency", "0"),
        ("--concurrency", "1,x"),
        ("--rate", "-1"),
        ("--rate", "inf"),
        ("--rate", ""),
        ("--input-tokens", "9-3"),
        ("--output-tokens", "0"),
        ("--image", "336"),
        ("--slo", "ttft=2000,speed=1"),
        ("--slo", "ttft"),
        ("--duration", "0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(option: str, value: str) -> None:
    refused(bench("--url", "http://127.0.0.1:1", option, value), option)


def test_an_unwritable_file_is_refused_before_the_load(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ScriptedServer() as server:
        refused(bench("--url", server.url, "--json", tmp_path / "file" / "figures"), "cannot be")
    assert server.probes == server.bodies == []


def interrupt(tmp_path: Path, number: signal.Signals, answered: int) -> tuple[int, str, Any]:
    """Exit code, output and figures of a load that gets a signal after so many answers."""
    reached, file = threading.Event(), tmp_path / "load.json"

    def script(index: int, body: dict[str, Any]) -> Script:
        if index < answered:
            return Script()
        reached.set()
        return Script(delay=600)

    with ScriptedServer(script) as server:
        arguments = ["--url", server.url, "--requests", "9", "--warmup", "0", "--json", str(file)]
        command = [sys.executable, "-m", "glmcompile", "bench", *arguments]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Even if whoever runs the tests ignores it, as nohup does.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
        assert reached.wait(60)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    figures = json.loads(file.read_text()) if file.exists() else None
    return process.returncode, output, figures


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reports_what_was_answered(tmp_path: Path, number: signal.Signals) -> None:
    code, output, figures = interrupt(tmp_path, number, answered=3)
    assert code == 130
    assert "Interrupted" in output
    assert "Traceback" not in output
    (level,) = figures["levels"]
    assert (level["answered"], level["unfinished"]) == (3, 1)
    assert figures["interrupted"]


def test_an_interrupt_before_any_answer_writes_nothing(tmp_path: Path) -> None:
    code, output, figures = interrupt(tmp_path, signal.SIGINT, answered=0)
    assert code == 130
    assert output.endswith("interrupted; nothing was written.\n")
    assert "Traceback" not in output
    assert figures is None
