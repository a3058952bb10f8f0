"""Compiling real checkpoints: what INT8 engines hold, that they answer, and that bytes repeat."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image

import glmcompile
from glmcompile.artifact import MANIFEST, open_artifact
from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler import compile_checkpoint
from glmcompile.compiler.calls import OUTPUTS
from glmcompile.compiler.samples import compared_samples
from glmcompile.errors import CalibrationError, GlmcompileError, ParityError
from glmcompile.export.weights import CheckpointTensor
from glmcompile.quantize import graph as quantize_graph_module
from glmcompile.quantize.weights import QuantizedWeight
from glmcompile.runtime.teacher_forcing import AnswerEncoder, TeacherForcing
from tests.engines import TinyEngine

Engines = Callable[[str, str], Path]
TABLE = "model.language_model.embed_tokens.weight"


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
        assert "LinearW8A8" in operators
        assert ("EmbeddingW8" in operators) == (component == "decoder")
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
    assert {row["component"] for row in manifest["parity"]} == {"vision_encoder", "decoder"}
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
    layers = len(open_artifact(engine).model.attention)
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


def test_an_image_models_decoder_takes_no_image_at_all(
    tiny_engine: Callable[..., TinyEngine], engines: Engines
) -> None:
    engine = engines("glm4v", "fp32")
    ids = [5, 6, 7]
    found = TeacherForcing(engine, open_artifact(engine).model)(ids)
    assert set(found) == {"logits"}
    checkpoint = tiny_engine("glm4v").checkpoint
    model = transformers.Glm4vForConditionalGeneration.from_pretrained(checkpoint)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=2e-4)


def test_every_layer_equals_transformers(
    checkpoint_of: Callable[[str], Checkpoint], engines: Engines, family_name: str
) -> None:
    checkpoint = checkpoint_of(family_name)
    rows = json.loads((engines(family_name, "fp32") / MANIFEST).read_text())["parity"]
    compared = {(row["component"], row["output"], row["call"]) for row in rows}
    if checkpoint.model.vision is not None:
        blocks = checkpoint.structure.layers["vision_encoder"]
        assert len(blocks) == 2
        for output in (*blocks, "image_features"):
            for image in range(5):  # of all compared samples, one a call
                assert ("vision_encoder", output, f"packed.{image}") in compared
    layers = checkpoint.structure.layers["decoder"]
    assert len(layers) == len(checkpoint.model.attention) == 2
    for output in (*layers, "logits"):
        for call in ("packed", "chunk0", "chunk1", "chunk2"):
            assert ("decoder", output, call) in compared
    assert all(row["max_error"] < 2e-5 for row in rows)


def test_every_quantized_layer_is_compared_as_it_ships(
    checkpoint_of: Callable[[str], Checkpoint], engines: Engines, family_name: str
) -> None:
    rows = json.loads((engines(family_name, "int8") / MANIFEST).read_text())["shipped"]
    for component, layers in checkpoint_of(family_name).structure.layers.items():
        compared = [row["output"] for row in rows if row["component"] == component]
        # First what the first layer is given: the quantized embedding's rows, or patches.
        assert compared[1:] == [*layers, OUTPUTS[component]]
    assert all(0 < row["layer_error"] < 0.06 for row in rows), rows
    assert all(0 < row["chain_error"] < 0.08 for row in rows), rows


@pytest.mark.parametrize("family_name", ["glm4v", "qwen2_vl"])
def test_samples_cover_several_images_of_different_sizes(
    checkpoint_of: Callable[[str], Checkpoint], engines: Engines, family_name: str
) -> None:
    samples = compared_samples(checkpoint_of(family_name), engines(family_name, "fp32"))
    assert [len(sample.images) for sample in samples] == [2, 1, 0, 1, 1]
    grids = np.concatenate([sample.grid_thw for sample in samples[:2]])
    assert len({tuple(grid) for grid in grids}) == 3


@pytest.mark.parametrize(
    ("family", "component", "layer", "weight"),
    [
        ("glm4v", "vision_encoder", "model.visual.blocks.1", "attn.proj.weight"),
        ("glm4v", "decoder", "model.language_model.layers.0", TABLE),
        ("llama", "decoder", "model.layers.1", "self_attn.o_proj.weight"),
    ],
)
def test_a_wrong_weight_is_blamed_on_its_layer(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    component: str,
    layer: str,
    weight: str,
) -> None:
    name = weight if weight == TABLE else f"{layer}.{weight}"
    blocks = CheckpointTensor.blocks

    def wrong(self: CheckpointTensor) -> Iterator[np.ndarray]:
        for block in blocks(self):
            yield np.roll(block, 1) if self.parameter == name else block

    monkeypatch.setattr(CheckpointTensor, "blocks", wrong)
    blamed = rf"^{component}: {re.escape(layer)} \(packed[.0-9]*\) differs .*worst at \[\d+, \d+\]"
    with pytest.raises(ParityError, match=blamed):
        compile_checkpoint(tiny_checkpoint(family), tmp_path / "engine", precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_quantized_layer_is_found(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = quantize_graph_module.quantize_weight
    calls = 0

    def broken(*arguments: Any) -> QuantizedWeight:
        nonlocal calls
        calls += 1
        weight = quantize(*arguments)
        if calls == 4:  # embedding, then q/k/v, o and gate/up of the first layer
            weight = replace(weight, scale=np.roll(weight.scale, 1) * 2)
        return weight

    monkeypatch.setattr(quantize_graph_module, "quantize_weight", broken)
    with pytest.raises(ParityError, match=r"^decoder: model\.layers\.0 quantized differs"):
        compile_checkpoint(tiny_checkpoint("llama"), tmp_path / "engine")


def test_calibration_can_run_behind_quantized_layers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    engines = []
    for inputs in ("float32", "quantized"):
        recipe = tmp_path / f"{inputs}.toml"
        recipe.write_text(f'[calibration]\nsamples = 2\ninputs = "{inputs}"\n')
        engines.append(
            compile_checkpoint(tiny_checkpoint("llama"), tmp_path / inputs, recipe=recipe)
        )
    manifests = [json.loads((each / MANIFEST).read_text()) for each in engines]
    recipes = [each["quantization"]["recipe"]["calibration"] for each in manifests]
    assert [each["inputs"] for each in recipes] == ["float32", "quantized"]
    weights = [each["files"]["weights.bin"] for each in manifests]
    assert weights[0]["bytes"] == weights[1]["bytes"]
    assert weights[0]["sha256"] != weights[1]["sha256"]


def test_a_killed_compile_goes_on_and_gives_the_same_bytes(
    tiny_engine: Callable[..., TinyEngine], tmp_path: Path
) -> None:
    """Killed without warning after the reference and amid the layers, interrupted, finished."""
    tiny = tiny_engine("llama", "int8")
    command = [sys.executable, "-m", "glmcompile", "compile", str(tiny.checkpoint)]
    command += ["-o", str(tmp_path / "engine"), "--recipe", str(tiny.path.parent / "short.toml")]
    journal = tmp_path / ".engine.compile" / "journal.jsonl"

    def done() -> int:
        return len(journal.read_text().splitlines()) - 1 if journal.exists() else 0

    for stages, number in ((1, signal.SIGKILL), (3, signal.SIGKILL), (4, signal.SIGINT)):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job, which the tests may be, ignores SIGINT, as do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 120
        while done() < stages and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors
        if number == signal.SIGINT and process.returncode:
            assert process.returncode == 130
            assert "interrupted; run the same command again to go on" in errors
        if process.returncode == 0:
            break  # it had finished before the signal came
        assert [each.name for each in tmp_path.iterdir()] == [".engine.compile"]
        assert done() >= stages
    if not (tmp_path / "engine").exists():
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert [each.name for each in tmp_path.iterdir()] == ["engine"]
    for file in sorted(tiny.path.iterdir()):
        assert (tmp_path / "engine" / file.name).read_bytes() == file.read_bytes(), file.name
