"""GLM-4.1V-9B's own widths: checkpoints of one layer and of two, compiled and compared with torch.

Compiling compares every layer in float32 with torch and every quantized one with float32, and ends
with an error beyond the bounds; the bounds here are those that these widths were seen to keep.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import glmcompile
from glmcompile.artifact import MANIFEST
from glmcompile.compiler import compile_checkpoint

ROOT = Path(__file__).parents[2]
WORDS = 1024  # of the reference checkpoint's tokenizer, in place of 151,552


def compiled(folder: Path, precision: str, layers: int, vision_layers: int) -> dict:
    """The manifest of an engine with so many layers, at `folder`/engine."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from full_size import write_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "calibration" / "reference")
    write_checkpoint(folder / "checkpoint", tokenizer, layers, vision_layers, WORDS)
    recipe = folder / "short.toml"
    recipe.write_text("[calibration]\nsamples = 4\n")
    options = {"recipe": recipe} if precision == "int8" else {}
    compile_checkpoint(folder / "checkpoint", folder / "engine", precision=precision, **options)
    return json.loads((folder / "engine" / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("precision", "layers"),
    [
        ("fp32", 1),
        ("int8", 1),
        pytest.param("fp32", 2, marks=pytest.mark.slow),
        pytest.param("int8", 2, marks=pytest.mark.slow),
    ],
)
def test_the_published_widths_equal_torch(tmp_path: Path, precision: str, layers: int) -> None:
    manifest = compiled(tmp_path, precision, layers, layers)
    assert manifest["model"]["hidden_size"] == 4096
    outputs = {row["output"] for row in manifest["parity"]}
    assert {"image_features", "logits"} <= outputs
    assert len(outputs) == 2 + 2 * layers
    assert all(row["max_error"] < 4e-5 for row in manifest["parity"]), manifest["parity"]
    if precision == "int8":
        # Seen: 0.038 at most, of the merger behind the vision layers.
        assert all(0 < row["layer_error"] < 0.08 for row in manifest["shipped"])
    with glmcompile.load(tmp_path / "engine", verify=False) as engine:
        answer = engine.generate(prompt="Open Chat.", max_tokens=2, ignore_eos=True)
    assert answer.usage.completion_tokens == 2
