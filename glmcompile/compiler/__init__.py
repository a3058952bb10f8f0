"""The compile pipeline: checkpoint, torch's own results, layers of each component, engine."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glmcompile.artifact import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    TOKENIZER,
    check_free,
    store_path,
    write_manifest,
)
from glmcompile.calibrate.samples import CalibrationSample, digest, recipe_samples
from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.compiler import reference, timing
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.geometry import geometry
from glmcompile.compiler.layers import Compiled, Work, activations, compile_component
from glmcompile.compiler.needs import Load, check_resources, load_of
from glmcompile.compiler.samples import calibration_samples, compared_samples
from glmcompile.compiler.store import Store, open_store
from glmcompile.errors import GlmcompileError
from glmcompile.progress import Progress, Silent
from glmcompile.quantize.schemes import DEFAULT_RECIPE, Float32, Recipe, load_recipe
from glmcompile.runtime.image_processor import BORROWED
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.runtime.transformers_processor import PROCESSOR_FILES

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
    adapter: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Compile a local checkpoint to an engine directory and return its path.

    checkpoint: directory as Hugging Face publishes it, or a GGUF file (see glmcompile.checkpoint).

    precision: "int8" (W8A8 as the recipe says) or "fp32".
    recipe: name of a bundled recipe or path of a TOML file; int8 only.
    calibration: folder of samples (see calibrate.samples); None takes the bundled ones.
    kv_dtype: "int8" or "fp32"; None follows the recipe, and is fp32 for an fp32 engine.
    adapter: directory of a LoRA adapter, as PEFT writes it, that is merged.
    overwrite: replace an engine that stands at `output`.
    An interrupted compile is kept beside `output` (see compiler.store), and the same call again
    goes on with it. Raises GlmcompileError of the kind that says what is wrong; nothing is left
    then.
    """
    if precision not in PRECISIONS:
        raise GlmcompileError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}.")
    if target not in TARGETS:
        raise GlmcompileError(f"target {target}: expected one of {', '.join(TARGETS)}.")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise GlmcompileError(f"KV cache type {kv_dtype}: expected one of {', '.join(KV_DTYPES)}.")
    check_free(Path(output), overwrite)
    progress = progress or Silent()
    plan = _plan(precision, recipe, kv_dtype)
    source = open_checkpoint(checkpoint, adapter)
    for note in source.notes:
        progress.note(note)
    vision = source.model.vision
    placeholder = vision.placeholder if vision is not None else None
    PromptBuilder(source.directory, placeholder)  # refuses what the engine could not open
    samples = recipe_samples(source.model, plan, calibration) if plan is not None else []
    record: dict[str, Any] = {"precision": precision, "target": target}
    if plan is not None:
        data = {
            "source": "bundled" if calibration is None else Path(calibration).resolve().name,
            "samples": len(samples),
            "sha256": digest(samples),
        }
        record["quantization"] = {"recipe": plan.to_json(), "data": data}
    held = sum(file.stat().st_size for file in store_path(Path(output)).rglob("*"))
    load = load_of(source, plan, samples) if plan is not None else Load()
    shapes = geometry(source)
    check_resources(source, shapes, precision, load, Path(output), held)
    progress.expect(timing.stages(source, shapes, precision, load))
    total = sum(file.stat().st_size for file in source.files)
    record |= {
        "source": {
            "name": source.path.resolve().name,
            "sha256": source.hash(progress.stage(timing.HASHING_CHECKPOINT, total)),
        },
        **({"adapter": Path(adapter).resolve().name} if adapter is not None else {}),
        "sampling": source.sampling,
        "tools": {name: version(name) for name in TOOLS},
        # Kernels choose their instructions when a session opens; none is taken for granted.
        "required_cpu_features": [],
        "architecture": platform.machine(),
    }
    with open_store(output, {"format_version": FORMAT_VERSION, **record}, overwrite) as store:
        compiled = _compile(source, plan, samples, store, progress)
        if plan is not None:
            record["quantization"]["layers"] = {
                name: scheme for each in compiled for name, scheme in each.schemes.items()
            }
            record["shipped"] = [row for each in compiled for row in each.shipped]
        record["parity"] = [row for each in compiled for row in each.parity]
        progress.stage(timing.HASHING_ENGINE)
        write_manifest(store.engine, source.model, record)
    return Path(output)


def _compile(
    source: Checkpoint,
    plan: Recipe | None,
    samples: list[CalibrationSample],
    store: Store,
    progress: Progress,
) -> list[Compiled]:
    """Every component, into the store's engine."""
    _copy_tokenizer(source, store.engine)
    compared = compared_samples(source, store.engine)
    torch = Activations(store.work / "torch")
    layers = reference.layer_count(source)
    done = layers if store.result("torch") is not None else 0
    advance = progress.stage(timing.RUNNING_TORCH, layers, done)
    if not done:
        reference.compute(source, compared, torch, advance)
        store.record("torch", {})
    calibrating = (
        calibration_samples(source, store.engine, samples, plan.max_tokens)
        if plan is not None
        else []
    )
    work = Work(source, plan, compared, calibrating, torch, store, progress)
    compiled: list[Compiled] = []
    before: Activations | None = None
    for component in source.model.components:
        compiled.append(compile_component(work, component, before))
        quantized = plan is not None and plan.inputs == "quantized"
        before = activations(store, component, "shipped" if quantized else "float32")
    return compiled


def _plan(precision: str, recipe: str | Path, kv_dtype: str | None) -> Recipe | None:
    """The recipe with the command line's wishes in it; None where nothing is to be quantized."""
    if precision == "fp32":
        if kv_dtype != "int8":
            return None
        return Recipe("float32", Float32(), kv_dtype="int8")
    plan = load_recipe(recipe)
    return replace(plan, kv_dtype=KV_DTYPES[kv_dtype]) if kv_dtype else plan


def _copy_tokenizer(source: Checkpoint, stage: Path) -> None:
    vision = source.model.vision
    borrowed = vision is not None and vision.processor.name == BORROWED
    for name in dict.fromkeys((*COPIED_FILES, *(PROCESSOR_FILES if borrowed else ()))):
        file = source.directory / name
        if file.is_file():
            shutil.copyfile(file, stage / name)
    if source.chat_template is not None:
        (stage / CHAT_TEMPLATE).write_text(source.chat_template, encoding="utf-8")
