"""How long a compile and an engine's answers take: shapes, and a few seconds of measuring."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from glmcompile.bench import rates
from glmcompile.bench.rates import Layer, Rates
from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.geometry import MERGED, PATCH, SAMPLED, TOKEN, Geometry
from glmcompile.compiler.needs import COMPARED_PATCHES, COMPARED_TOKENS, Load, Prompt
from glmcompile.contract import DECODER, VISION, Contract
from glmcompile.quantize.weights import quantize_weight
from glmcompile.runtime.image_processor import image_processor

HASHING_CHECKPOINT, RUNNING_TORCH = "Hashing the checkpoint", "Running torch"
HASHING_ENGINE = "Hashing the engine"

# Tokens that a step prefills at most.
STEP_TOKENS = 2048
# Tokens that attention is measured on, and half of the patches.
ATTENDED = {"fp32": 512, "int8": 1024}
# Operations that are measured of a prefill, so that a large model's takes no longer.
OPERATIONS = {"fp32": 30e9, "int8": 200e9}
# Seconds of Python around a step.
STEP_SECONDS = 4e-4
# Bytes a second at which files come from the disk, and at which the float32 layers of a compile are
# rearranged for every call.
DISK_RATE, PACKING_RATE = 0.3e9, 4e9
# Calls of a component on what is compared: packed and in chunks.
COMPARED_CALLS = 4
# Seconds of a compile that do not depend on weights: imports, and tracing, simplifying and opening
# the sessions of a component and of a layer.
START_SECONDS, EXPORT_SECONDS, LAYER_SECONDS = 6.0, 3.0, 0.5


@dataclass(frozen=True)
class Machine:
    """What this machine reaches on a model.

    rates: by precision. hashing: GB/s. quantize: weights a second. convert: a second, to float32.
    preprocess: seconds from a screenshot to patches.
    """

    rates: dict[str, Rates]
    hashing: float
    quantize: float
    convert: float
    preprocess: float


@dataclass(frozen=True)
class Latency:
    """Seconds. vision: a part of ttft. tpot: of one output token behind the prompt."""

    vision: float
    ttft: float
    tpot: float


# To weigh stages against each other where nothing is measured.
USUAL = Machine(
    {name: Rates(300, 150, 300, 150, 0.1) for name in ("fp32", "int8")}, 1.0, 2e8, 1e9, 0.0
)


def measure(
    checkpoint: Checkpoint, shapes: Geometry, prompt: Prompt, image: tuple[int, int], threads: int
) -> Machine:
    """Run layers of this model's sizes on this machine, and what a compile does to weights.

    image: width and height of the prompt's screenshot.
    """
    model = checkpoint.model
    memory = rates.Memory()
    found = {name: _rates(name, shapes, model, prompt, threads, memory) for name in OPERATIONS}
    block = np.random.default_rng(0).standard_normal((512, 4096), np.float32)
    halves = block.astype(np.float16)
    preprocess = 0.0
    if model.vision is not None:
        screen = Image.effect_noise(image, 80).convert("RGB")
        processor = image_processor(model.vision, checkpoint.directory)
        preprocess = _timed(lambda: processor(screen).inputs)
    return Machine(
        found,
        rates.hashing(),
        block.size / _timed(lambda: quantize_weight(block, block[0], 0.5)),
        block.size / _timed(lambda: halves.astype(np.float32)),
        preprocess,
    )


def _rates(
    precision: str,
    shapes: Geometry,
    model: Contract,
    prompt: Prompt,
    threads: int,
    memory: rates.Memory,
) -> Rates:
    layer = shapes.layer(model)
    # As many layers as the model has, or as fill the processor's caches many times over.
    weights = rates.READ_BYTES // (1 if precision == "int8" else 4)
    part = _narrowed(layer, weights // 3)
    count = min(shapes.layers, max(1, weights * 3 // 4 // part.parameters))
    head = min(shapes.table.out_features, weights // 4 // layer.width)
    one_token = {"count": count, "past": prompt.tokens, "head": head}
    token = rates.layers(precision, part, 1, threads, memory, **one_token)
    whole = shapes.layers * layer.parameters + shapes.table.parameters
    token *= whole / (count * part.parameters + head * layer.width)

    def of(layer: Layer, tokens: int, attended: int) -> tuple[float, float]:
        """GOP/s of a layer but for its attention, on so many rows at most, and of attention."""
        layer = _narrowed(layer, weights)
        most = OPERATIONS[precision] / layer.parameters / 2
        rows = max(16, int(min(tokens, STEP_TOKENS, most)))
        attention = rates.attention(precision, layer, min(tokens, attended), threads)
        pairs = rows * (rows + 1) / 2 if layer.paged else rows**2
        attending = 4 * layer.heads * layer.head_size * pairs / attention / 1e9
        seconds = rates.layers(precision, layer, rows, threads, memory)
        # Of few tokens attention costs less within a layer than by the rate of many.
        return 2 * rows * layer.parameters / max(seconds - attending, seconds / 2) / 1e9, attention

    found = of(layer, prompt.tokens, ATTENDED[precision])
    visual = shapes.vision_layer(model)
    seen = found if visual is None else of(visual, prompt.patches, 2 * ATTENDED[precision])
    return Rates(*found, *seen, token)


def _narrowed(layer: Layer, parameters: int) -> Layer:
    """The layer, with a narrower MLP where it has more parameters than that."""
    inner = layer.inner
    while layer.parameters > parameters and inner > layer.width // 4:
        inner //= 2
        layer = replace(layer, inner=-(-inner // 64) * 64)
    return layer


def latency(
    shapes: Geometry, model: Contract, precision: str, prompt: Prompt, on: Machine
) -> Latency:
    """Of one precision on a machine."""
    vision = encoding(shapes, model, prompt.patches, on.rates[precision])
    first = prefill(shapes, model, prompt.tokens, on.rates[precision])
    ttft = on.preprocess + vision + first + STEP_SECONDS
    return Latency(vision, ttft, on.rates[precision].token + STEP_SECONDS)


def encoding(shapes: Geometry, model: Contract, patches: int, by: Rates) -> float:
    """Seconds of the vision encoder for so many patches of one image."""
    merge = shapes.merged
    linear = shapes.operations({PATCH: patches, MERGED: patches // merge}) / by.vision_linear
    pairs = 4 * shapes.vision_width * shapes.vision_layers * patches**2
    return (linear + pairs / by.vision_attention) / 1e9


def prefill(shapes: Geometry, model: Contract, tokens: int, by: Rates) -> float:
    """Seconds of the decoder for so many new tokens of one prompt."""
    linear = shapes.operations({TOKEN: tokens, SAMPLED: 1}) / by.linear
    width = sum(each.heads * (each.head_size + each.value_size) for each in model.attention) // 2
    return (linear + 2 * width * tokens**2 / by.attention) / 1e9


def stages(
    checkpoint: Checkpoint, shapes: Geometry, precision: str, load: Load, on: Machine = USUAL
) -> dict[str, float]:
    """Seconds of a compile's stages, by the names that its progress shows, in their order."""
    model, by = checkpoint.model, on.rates["fp32"]
    source = sum(file.stat().st_size for file in checkpoint.files)
    compared, calibrated = [
        {
            VISION: encoding(shapes, model, patches, by),
            DECODER: prefill(shapes, model, tokens, by),
        }
        for tokens, patches in (
            (COMPARED_TOKENS, COMPARED_PATCHES if shapes.vision_layers else 0),
            (load.tokens, load.patches),
        )
    ]
    parameters = {
        VISION: shapes.operations({PATCH: 1, MERGED: 1}) // 2,
        DECODER: shapes.operations({TOKEN: 1, SAMPLED: 1}) // 2 + shapes.table.parameters,
    }
    layers = {VISION: shapes.vision_layers, DECODER: shapes.layers}
    found = {
        HASHING_CHECKPOINT: source / DISK_RATE,
        RUNNING_TORCH: START_SECONDS + 2 * shapes.parameters / on.convert + sum(compared.values()),
    }
    quantizing = precision == "int8"
    for component in checkpoint.model.components:
        weights = parameters[component]
        # In float32 whole and in chunks, and as it ships.
        work = 3 * compared[component] + quantizing * calibrated[component]
        calls = COMPARED_CALLS + quantizing * load.samples
        work += weights * (2 / on.convert + quantizing / on.quantize + 4 * calls / PACKING_RATE)
        found[exporting(component)] = EXPORT_SECONDS
        found[compiling(component)] = work + layers[component] * LAYER_SECONDS
    return found | {HASHING_ENGINE: shapes.engine_bytes(precision) / on.hashing / 1e9}


def exporting(component: str) -> str:
    """A stage's name."""
    return f"Exporting {component}"


def compiling(component: str) -> str:
    """A stage's name."""
    return f"Compiling {component}"


def _timed(run: Callable[[], Any]) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
