"""The families serve the runtime too, so they must import without the compiler's packages."""

from __future__ import annotations

import subprocess
import sys


def test_families_import_no_torch_transformers_or_onnx() -> None:
    code = (
        "import sys, glmcompile.families;"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnx_ir') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
