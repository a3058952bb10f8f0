"""Compiling real checkpoints: what INT8 engines hold, that they answer, and that bytes repeat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import glmcompile
from glmcompile.artifact import MANIFEST, open_artifact
from glmcompile.compiler import compile_checkpoint
from glmcompile.errors import CalibrationError, GlmcompileError
from glmcompile.runtime.teacher_forcing import AnswerEncoder, TeacherForcing
from tests.engines import TinyEngine

Engines = Callable[[str, str], Path]


@pytest.fixture
def engines(tiny_engine: Callable[..., TinyEngine]) -> Engines:
    """(family, precision) -> engine directory, with a short calibration."""
    return lambda family, precision: tiny_engine(family, precision).path


def graph(engine: Path, component: str) -> onnx.GraphProto:
    return onnx.load(engine / f"{component}.onnx", load_external_data=False).graph


@pytest.mark.parametrize("family", ["glm4v", "llama"])
def test_int8_engines_hold_int8_weights_and_pools(engines: Engines, family: str) -> None:
    engine = engines(family, "int8")
    for component in open_artifact(engine).components:
        operators = {node.op_type for node in graph(engine, component).node}
        assert "FusedMatMul" not in operators
        assert ("EmbeddingW8" if component == "embedding" else "LinearW8A8") in operators
    pools = [each for each in graph(engine, "decoder").input if "_cache." in each.name]
    assert {each.type.tensor_type.elem_type for each in pools} == {onnx.TensorProto.INT8}
    fp32 = open_artifact(engines(family, "fp32"))
    assert open_artifact(engine).size < 0.45 * fp32.size


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl", "llama"])
def test_int8_logits_stay_near_float32(engines: Engines, family: str) -> None:
    fp32, int8 = engines(family, "fp32"), engines(family, "int8")
    model = open_artifact(fp32).model
    images = (Image.effect_mandelbrot((84, 112), (-2, -1, 1, 1), 50).convert("RGB"),)
    token_ids, processed, _ = AnswerEncoder(fp32, model)(
        "What is this?", "A set.", images if model.vision else ()
    )
    expected = TeacherForcing(fp32, model)(token_ids, processed)["logits"]
    actual = TeacherForcing(int8, model)(token_ids, processed)["logits"]
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > 0.98


def test_the_manifest_says_where_the_engine_comes_from(engines: Engines) -> None:
    manifest = json.loads((engines("glm4v", "int8") / MANIFEST).read_text())
    assert len(manifest["source"]["sha256"]) == 64
    assert manifest["source"]["name"] == "checkpoint"
    quantization = manifest["quantization"]
    assert quantization["recipe"]["linear"] == {"scheme": "w8a8", "smoothing": 0.5}
    assert quantization["data"]["samples"] == 4
    assert set(quantization["layers"].values()) == {"w8a8"}
    assert {row["component"] for row in manifest["parity"]} == {
        "vision_encoder",
        "embedding",
        "decoder",
    }
    assert {"torch", "transformers", "onnxruntime"} <= set(manifest["tools"])


def test_the_same_input_gives_the_same_bytes(
    tiny_engine: Callable[..., TinyEngine], tmp_path: Path
) -> None:
    tiny = tiny_engine("glm4v", "int8")
    first, recipe = tiny.path, tiny.path.parent / "short.toml"
    again = compile_checkpoint(tiny.checkpoint, tmp_path / "again", recipe=recipe)
    for file in sorted(first.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_layers_can_be_kept_in_float32(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        "[calibration]\nsamples = 2\n"
        '[[override]]\nlayers = "*.down_proj"\nscheme = "float32"\n'
        '[kv_cache]\ndtype = "float32"\n'
    )
    engine = compile_checkpoint(tiny_checkpoint("llama"), tmp_path / "mixed", recipe=recipe)
    operators = [node.op_type for node in graph(engine, "decoder").node]
    layers = open_artifact(engine).model.num_layers
    assert operators.count("FusedMatMul") == layers
    assert operators.count("LinearW8A8") == 3 * layers + 1
    with glmcompile.load(engine) as loaded:
        assert loaded.generate(prompt="Hello", max_tokens=4).usage.completion_tokens > 0


def test_a_float32_engine_can_have_an_int8_cache(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = compile_checkpoint(
        tiny_checkpoint("llama"), tmp_path / "engine", precision="fp32", kv_dtype="int8"
    )
    operators = {node.op_type for node in graph(engine, "decoder").node}
    assert "LinearW8A8" not in operators
    pools = [each for each in graph(engine, "decoder").input if "_cache." in each.name]
    assert {each.type.tensor_type.elem_type for each in pools} == {onnx.TensorProto.INT8}


def test_samples_without_images_cannot_calibrate_an_image_model(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl").write_text('{"prompt": "hello"}\n')
    with pytest.raises(CalibrationError, match="needs samples with images"):
        compile_checkpoint(tiny_checkpoint("glm4v"), tmp_path / "engine", calibration=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("option", ["precision", "target", "kv_dtype"])
def test_an_unknown_option_value_lists_the_known_ones(tmp_path: Path, option: str) -> None:
    with pytest.raises(GlmcompileError, match="int5: expected one of"):
        compile_checkpoint(tmp_path, tmp_path / "engine", **{option: "int5"})  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_nothing(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "glmcompile", "compile", str(tiny_checkpoint("llama"))]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "engine")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, which the tests may be, ignores SIGINT and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert process.returncode == 130
