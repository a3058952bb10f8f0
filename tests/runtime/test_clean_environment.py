"""An engine runs where nothing but the package's own runtime dependencies is installed."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

from tests.engines import TinyEngine

REPOSITORY = Path(__file__).parents[2]


def test_a_clean_environment_runs_an_engine(
    tiny_engine: Callable[[str], TinyEngine], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(REPOSITORY)], check=True)
    installed = subprocess.run(
        [python, "-m", "pip", "list"], check=True, capture_output=True, text=True
    ).stdout
    assert "torch" not in installed
    assert "transformers" not in installed
    command = ["-m", "glmcompile", "run", str(tiny_engine("glm4v").path), "--prompt", "Hi"]
    result = subprocess.run(
        [python, *command, "--max-tokens", "4"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    with tiny_engine("glm4v").open() as engine:
        assert result.stdout == engine.generate(prompt="Hi", max_tokens=4).text + "\n"
