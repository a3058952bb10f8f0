"""The compile pipeline: checkpoint, graphs, parity, calibration, INT8, engine directory."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from glmcompile.artifact import CHAT_TEMPLATE, TOKENIZER, staged, write_manifest
from glmcompile.calibrate.collect import Statistics, collect
from glmcompile.calibrate.observe import Observe
from glmcompile.calibrate.samples import bundled_samples, digest, folder_samples
from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.errors import GlmcompileError
from glmcompile.export import export_component, save_components
from glmcompile.export.parity import ParityReport, check_parity
from glmcompile.passes import simplify
from glmcompile.progress import Progress, Silent
from glmcompile.quantize.graph import quantize_models
from glmcompile.quantize.schemes import DEFAULT_RECIPE, Float32, Recipe, load_recipe
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.targets.cpu.lower import lower

PRECISIONS = ("int8", "fp32")
TARGETS = ("cpu",)
KV_DTYPES = {"int8": "int8", "fp32": "float32"}
COPIED_FILES = (TOKENIZER, "tokenizer_config.json", CHAT_TEMPLATE)
TOOLS = ("glmcompile", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers")


def compile_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "int8",
    recipe: str | Path = DEFAULT_RECIPE,
    calibration: str | Path | None = None,
    target: str = "cpu",
    kv_dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Compile a local Hugging Face checkpoint to an engine directory and return its path.

    precision: "int8" (W8A8 as the recipe says) or "fp32".
    recipe: name of a bundled recipe or path of a TOML file; int8 only.
    calibration: folder of samples (see calibrate.samples); None takes the bundled ones.
    kv_dtype: "int8" or "fp32"; None follows the recipe, and is fp32 for an fp32 engine.
    overwrite: replace an engine that stands at `output`.
    Raises GlmcompileError of the kind that says what is wrong; nothing is left at `output` then.
    """
    if precision not in PRECISIONS:
        raise GlmcompileError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}.")
    if target not in TARGETS:
        raise GlmcompileError(f"target {target}: expected one of {', '.join(TARGETS)}.")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise GlmcompileError(f"KV cache type {kv_dtype}: expected one of {', '.join(KV_DTYPES)}.")
    progress = progress or Silent()
    plan = _plan(precision, recipe, kv_dtype)
    with staged(output, overwrite) as stage:
        source = open_checkpoint(checkpoint)
        PromptBuilder(source.path, source.family)  # refuses what the engine could not open
        _copy_tokenizer(source, stage)
        models = _export(source, progress)
        record: dict[str, Any] = {"precision": precision, "target": target}
        if plan is None:
            report = _write_float(source, models, stage, progress)
        else:
            work = stage / "float32"
            statistics, report, data = _calibrate(
                source, models, stage, work, plan, calibration, progress
            )
            progress.stage("Quantizing")
            schemes = quantize_models(models, plan, statistics)
            _write(models, stage)
            shutil.rmtree(work)
            record["quantization"] = {"recipe": plan.to_json(), "layers": schemes, "data": data}
        record |= {
            "source": {"name": source.path.resolve().name, "sha256": source.hash()},
            "parity": report.to_json(),
            "sampling": source.sampling,
            "tools": {name: version(name) for name in TOOLS},
            # Kernels choose their instructions when a session opens; none is taken for granted.
            "required_cpu_features": [],
            "architecture": platform.machine(),
        }
        progress.stage("Hashing")
        write_manifest(stage, source.model, record)
    return Path(output)


def _plan(precision: str, recipe: str | Path, kv_dtype: str | None) -> Recipe | None:
    """The recipe with the command line's wishes in it; None where nothing is to be quantized."""
    if precision == "fp32":
        if kv_dtype != "int8":
            return None
        return Recipe("float32", Float32(), kv_dtype="int8")
    plan = load_recipe(recipe)
    return replace(plan, kv_dtype=KV_DTYPES[kv_dtype]) if kv_dtype else plan


def _copy_tokenizer(source: Checkpoint, stage: Path) -> None:
    for name in COPIED_FILES:
        file = source.path / name
        if file.is_file():
            shutil.copyfile(file, stage / name)
    if source.chat_template is not None:
        (stage / CHAT_TEMPLATE).write_text(source.chat_template, encoding="utf-8")


def _export(source: Checkpoint, progress: Progress) -> dict[str, ir.Model]:
    components = source.family.components
    done = progress.stage("Exporting", len(components))
    models = {}
    for count, component in enumerate(components, 1):
        models[component] = export_component(source, component)
        simplify(models[component])
        done(count)
    return models


def _write(models: Mapping[str, ir.Model], directory: Path) -> None:
    for model in models.values():
        lower(model)
    save_components(models, directory)


def _write_float(
    source: Checkpoint, models: dict[str, ir.Model], stage: Path, progress: Progress
) -> ParityReport:
    progress.stage("Writing")
    _write(models, stage)
    progress.stage("Checking parity")
    return check_parity(source, stage)


def _calibrate(
    source: Checkpoint,
    models: dict[str, ir.Model],
    stage: Path,
    work: Path,
    plan: Recipe,
    calibration: str | Path | None,
    progress: Progress,
) -> tuple[Statistics, ParityReport, dict[str, Any]]:
    """Parity and statistics from float32 graphs with observers, written to `work`."""
    with_images = source.model.vision is not None
    samples = list(
        folder_samples(calibration, plan.samples)
        if calibration is not None
        else bundled_samples(with_images, plan.samples)
    )
    progress.stage("Writing float32 graphs")
    observed = {name: model.clone() for name, model in models.items()}
    for model in observed.values():
        Observe()(model)
    _write(observed, work)
    for name in COPIED_FILES:
        if (stage / name).is_file():
            shutil.copyfile(stage / name, work / name)
    progress.stage("Checking parity")
    report = check_parity(source, work)
    advance = progress.stage("Calibrating", len(samples))
    statistics = collect(work, source.model, samples, plan.max_tokens, advance)
    # Sums in another order move the last digits from machine to machine; these many are stable.
    statistics = {name: _rounded(value) for name, value in statistics.items()}
    where = "bundled" if calibration is None else Path(calibration).resolve().name
    return (
        statistics,
        report,
        {"source": where, "samples": len(samples), "sha256": digest(samples)},
    )


def _rounded(value: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, as float16 has, without its limits on the exponent."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.rint(mantissa * 1024) / 1024, exponent).astype(np.float32)
