"""The runtime never imports torch, transformers or onnx, and imports quickly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.engines import TinyEngine

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")

PROGRAM = """
import sys
import glmcompile
assert len([name for name in sys.modules if name.startswith("glmcompile")]) == 1
with glmcompile.load({path!r}, threads=1, kv_cache_bytes=1 << 20) as engine:
    completion = engine.generate(text="Hello", max_tokens=3)
assert completion.usage.completion_tokens <= 3
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def test_loading_and_running_an_engine_imports_nothing_heavy(
    tiny_engine: Callable[[str], TinyEngine],
) -> None:
    path = str(tiny_engine("glm4v").path)
    program = PROGRAM.format(path=path, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
