"""What the Dockerfile does, in a clean virtual environment: build, install, serve, health, stop."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.deploy.files import exec_form
from tests.engines import TinyEngine
from tests.serve.servers import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel and its extra `serve` alone."""
    root = tmp_path_factory.mktemp("image")
    # What .dockerignore lets through, so that nothing else can be what the build needs.
    lines = Path(".dockerignore").read_text().splitlines()
    for name in [line[1:] for line in lines if line.startswith("!")]:
        if Path(name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(name, root / "source" / name, ignore=ignored)
        else:
            (root / "source").mkdir(exist_ok=True)
            shutil.copy(name, root / "source")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "-w", root / "wheel", "."]
    subprocess.run(build, cwd=root / "source", check=True)
    (wheel,) = (root / "wheel").glob("*.whl")
    venv.create(root / "venv", with_pip=True)
    bin = root / "venv" / "bin"
    subprocess.run([bin / "python", "-m", "pip", "install", "-q", f"{wheel}[serve]"], check=True)
    return bin


def test_the_image_has_what_running_needs_and_nothing_else(installed: Path) -> None:
    code = (
        "import importlib.util as u, sys;"
        "print([n for n in ('torch', 'transformers', 'onnx', 'ray', 'pytest') if u.find_spec(n)])"
    )
    done = subprocess.run(
        [installed / "python", "-c", code], cwd="/", check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_its_commands_serve_report_health_and_stop(
    installed: Path, tiny_engine: Callable[[str], TinyEngine], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    engine = str(tiny_engine("glm4v").path)

    def here(command: list[str]) -> list[str]:
        """The image's command with this machine's engine and a free port."""
        placed = [item.replace("8000", port).replace("/engine", engine) for item in command]
        return [str(installed / placed[0]), *placed[1:]]

    health = here(exec_form("HEALTHCHECK"))
    command = here([*exec_form("ENTRYPOINT"), *exec_form("CMD")])
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd="/", env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        assert subprocess.run(health, capture_output=True).returncode == 1  # nobody is there yet
        wait_for(lambda: subprocess.run(health, capture_output=True).returncode == 0)
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0, log.read_text()
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200  # its file is in the wheel
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    assert code == 0, log.read_text()
    assert '"path": "/v1/chat/completions"' in log.read_text()
