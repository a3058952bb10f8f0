"""Contract and rules serve the runtime too: they import without the compiler's packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime")


@pytest.mark.parametrize("module", ["glmcompile.contract", "glmcompile.rules"])
def test_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
