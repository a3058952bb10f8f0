"""What a compile and its engine will need: arithmetic over shapes, and a short measurement."""

from __future__ import annotations

import shutil
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from glmcompile.bench import rates
from glmcompile.bench.machine import available_memory
from glmcompile.bench.rates import Heads, Rates
from glmcompile.calibrate.samples import CalibrationSample, recipe_samples
from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.compiler.geometry import MERGED, PATCH, SAMPLED, TOKEN, Geometry, geometry
from glmcompile.compiler.samples import calibration_samples
from glmcompile.config import ModelConfig
from glmcompile.errors import ArtifactError
from glmcompile.quantize.schemes import DEFAULT_RECIPE, Recipe, load_recipe
from glmcompile.quantize.weights import quantize_weight
from glmcompile.targets.cpu import default_threads

PRECISIONS = ("fp32", "int8")

# Tokens of text beside a screenshot, and in a text model's prompt.
PROMPT_TOKENS = 600
# What an engine's process, and a compile's, holds besides weights and activations.
ENGINE_BYTES, COMPILE_BYTES = 200e6, 630e6
# Bytes a second at which weights come from the disk, at which the float32 layers of a compile are
# rearranged for every call, and at which decoding reads keys and values.
DISK_RATE, PACKING_RATE, CACHE_RATE = 0.6e9, 4e9, 10e9
# Calls of a component on what is compared: packed and in chunks.
COMPARED_CALLS = 4
# Tokens and patches that are compared with torch (see compiler.samples).
COMPARED_TOKENS, COMPARED_PATCHES = 400, 2000
# A step's other operators (rotary embedding, norms, what lies between) beside the two kinds that
# are measured; and operators of a layer, when so few rows are computed that starting them counts.
OTHERS, OPERATORS = 1.08, 8
# Seconds of Python and ONNX Runtime around a step.
STEP_SECONDS = 4e-4
# Seconds of a compile that do not depend on weights: imports, and tracing, simplifying and opening
# the sessions of a component and of a layer.
START_SECONDS, COMPONENT_SECONDS, LAYER_SECONDS = 6.0, 4.0, 0.6


@dataclass(frozen=True)
class Load:
    """What runs through a compile. tokens, patches: of all calibration samples together.

    longest: tokens of the longest sample.
    """

    samples: int = 0
    tokens: int = 0
    patches: int = 0
    longest: int = 0


@dataclass(frozen=True)
class Prompt:
    """The request that latency is predicted for. patches: of its image, 0 without one."""

    tokens: int
    patches: int


@dataclass(frozen=True)
class Space:
    """Bytes. kv: of keys and values of 1,000 tokens; activations: of the prompt's step."""

    engine: int
    compile_disk: int
    compile_memory: int
    kv: int
    activations: int

    @property
    def serve_memory(self) -> int:
        """To serve with a cache for 16,000 tokens."""
        return int(ENGINE_BYTES + self.engine + self.activations + 16 * self.kv)


@dataclass(frozen=True)
class Machine:
    """rates: by precision. quantize: weights a second. convert: a second, to float32."""

    rates: dict[str, Rates]
    hashing: float
    quantize: float
    convert: float
    operator_seconds: float


@dataclass(frozen=True)
class Time:
    """Seconds. vision: a part of ttft. tpot: of one output token behind the prompt."""

    compile: float
    vision: float
    ttft: float
    tpot: float


def predict(
    checkpoint: str | Path,
    image: tuple[int, int] = (1080, 2400),
    threads: int | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    calibration: str | Path | None = None,
) -> dict[str, Any]:
    """Everything of a checkpoint, JSON-serialisable; takes a few seconds.

    image: width and height of the screenshot that latency is predicted for. recipe, calibration: as
    they are to be compiled with.
    Raises CheckpointError, UnsupportedArchitectureError or CalibrationError as compiling would.
    """
    source = open_checkpoint(checkpoint)
    shapes, model = geometry(source), source.model
    prompt = prompt_of(source, image)
    plan = load_recipe(recipe)
    load = load_of(source, plan, recipe_samples(source.model, plan, calibration))
    measured = machine(shapes, model, PRECISIONS, threads or default_threads())
    source_bytes = sum(file.stat().st_size for file in source.files)
    precisions = {}
    for precision in PRECISIONS:
        needs = space(shapes, model, precision, prompt, load)
        time = seconds(shapes, model, precision, prompt, load, source_bytes, measured)
        precisions[precision] = {
            "space": {**asdict(needs), "serve_memory": needs.serve_memory},
            "time": asdict(time),
        }
    return {
        "parameters": shapes.parameters,
        "prompt": asdict(prompt),
        "calibration": asdict(load),
        "machine": asdict(measured),
        "precisions": precisions,
    }


def load_of(checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[CalibrationSample]) -> Load:
    """What a recipe's calibration samples are for this model."""
    encoded = calibration_samples(checkpoint, checkpoint.path, samples, recipe.max_tokens)
    lengths = [len(each.token_ids) for each in encoded]
    patches = sum(int(each.grid_thw.prod(axis=1).sum()) for each in encoded)
    return Load(len(samples), sum(lengths), patches, max(lengths))


def check_resources(
    checkpoint: Checkpoint,
    precision: str,
    recipe: Recipe | None,
    samples: Sequence[CalibrationSample],
    output: Path,
    held: int = 0,
) -> None:
    """Ask for disk and memory before a compile begins.

    recipe: None where nothing is calibrated. held: bytes that an earlier, interrupted compile has
    on the disk already. Raises ArtifactError with the figures where either does not suffice.
    """
    load = load_of(checkpoint, recipe, samples) if recipe is not None else Load()
    needs = space(geometry(checkpoint), checkpoint.model, precision, Prompt(0, 0), load)
    folder = next(each for each in output.absolute().parents if each.exists())
    free = shutil.disk_usage(folder).free + held
    if free < needs.engine + needs.compile_disk:
        raise ArtifactError(
            f"{output}: the engine needs {_size(needs.engine)} of disk and compiling it "
            f"{_size(needs.compile_disk)} besides, but {_size(free)} are free in {folder}; "
            "free some space or choose another output."
        )
    available = available_memory()
    if available is not None and available < needs.compile_memory:
        raise ArtifactError(
            f"{checkpoint.path}: compiling needs {_size(needs.compile_memory)} of memory, but "
            f"{_size(available)} are available; close other programs, or compile on a machine "
            "with more."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def prompt_of(checkpoint: Checkpoint, image: tuple[int, int] | None) -> Prompt:
    """A prompt with a screenshot of (width, height), or of text alone."""
    family, vision = checkpoint.family, checkpoint.model.vision
    if vision is None or image is None:
        return Prompt(PROMPT_TOKENS, 0)
    assert family.resize is not None
    height, width = family.resize(image[1], image[0], vision)
    grid = (1, height // vision.patch_size, width // vision.patch_size)
    return Prompt(PROMPT_TOKENS + family.image_tokens(grid, vision), prod(grid))


def space(
    shapes: Geometry, model: ModelConfig, precision: str, prompt: Prompt, load: Load
) -> Space:
    """Memory and disk of one precision ("int8" or "fp32"; its cache is of the same type)."""
    engine = shapes.engine_bytes(precision)
    width = 1 if precision == "int8" else 4
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_size * 1000 * width
    # Logits of what is compared are kept from torch, from the float32 graph and from what ships;
    # calibration's hidden states before and behind a layer, and as embeddings.
    hidden, compared = 4 * model.hidden_size, COMPARED_TOKENS
    work = 4 * model.vocab_size * compared * (3 if precision == "int8" else 2)
    work += hidden * (compared * (shapes.layers + 8) + 3 * load.tokens)
    work += (
        4 * shapes.vision_width * (COMPARED_PATCHES * (shapes.vision_layers + 4) + 2 * load.patches)
    )
    # A layer in float32 and what is made of it; of the logits, torch's and ours.
    memory = COMPILE_BYTES + 8.3 * shapes.largest_unit + 8 * model.vocab_size * compared
    memory = max(memory, COMPILE_BYTES + 6 * load.longest * (hidden + 4 * shapes.inner))
    return Space(engine, int(work), int(memory), kv, _activations(shapes, model, prompt))


def _activations(shapes: Geometry, model: ModelConfig, prompt: Prompt) -> int:
    """What the largest step of the encoder and of the decoder hold at once, in float32."""
    rows = min(prompt.tokens, 2048)
    decoder = rows * (4 * model.hidden_size + shapes.inner)
    vision = prompt.patches * (10 * shapes.vision_width + 3 * shapes.vision_inner // 2)
    # The patches themselves, as they are cut, normalised and read.
    pixels = 3 * prompt.patches * (model.vision.patch_values if model.vision is not None else 0)
    return 4 * (decoder + vision + pixels)


def machine(
    shapes: Geometry, model: ModelConfig, precisions: Sequence[str], threads: int
) -> Machine:
    """Measure what this machine's operators reach on matrices and heads of this model's sizes."""
    found = {}
    heads = Heads(model.num_heads, model.num_kv_heads, model.head_size)
    vision = model.vision
    for precision in precisions:
        linear = rates.linear(precision, model.hidden_size, threads)
        found[precision] = Rates(
            linear,
            rates.read(precision, model.hidden_size, shapes.decode_bytes(precision), threads),
            rates.attention(precision, heads, 1024, threads),
            rates.vision_attention(
                precision,
                Heads(vision.num_heads, vision.num_heads, vision.head_size),
                2048,
                threads,
            )
            if vision is not None
            else linear,
        )
    block = np.random.default_rng(0).standard_normal((512, 4096), np.float32)
    halves = block.astype(np.float16)
    return Machine(
        found,
        rates.hashing(),
        block.size / _timed(lambda: quantize_weight(block, block[0], 0.5)),
        block.size / _timed(lambda: halves.astype(np.float32)),
        rates.operator_seconds(threads),
    )


def seconds(
    shapes: Geometry,
    model: ModelConfig,
    precision: str,
    prompt: Prompt,
    load: Load,
    source_bytes: int,
    on: Machine,
) -> Time:
    """Time of one precision on a machine."""
    rate = on.rates[precision]
    merge = model.vision.merge_size**2 if model.vision is not None else 1
    overhead = OPERATORS * on.operator_seconds

    def encoding(patches: int, by: Rates) -> float:
        rows = {PATCH: patches, MERGED: patches // merge}
        pairs = 4 * shapes.vision_width * shapes.vision_layers * patches**2
        linear = shapes.operations(rows) / by.linear
        return OTHERS * (linear + pairs / by.vision_attention) / 1e9

    def prefill(tokens: int, by: Rates) -> float:
        linear = shapes.operations({TOKEN: tokens, SAMPLED: 1}) / by.linear
        width = model.num_layers * model.num_heads * model.head_size
        return OTHERS * (linear + 2 * width * tokens**2 / by.attention) / 1e9

    vision = encoding(prompt.patches, rate) + shapes.vision_layers * overhead
    first = prefill(prompt.tokens, rate) + shapes.layers * overhead + STEP_SECONDS
    cache = space(shapes, model, precision, prompt, load).kv * prompt.tokens / 1000
    token = shapes.decode_bytes(precision) / rate.read / 1e9 + cache / CACHE_RATE
    tpot = token + shapes.layers * overhead + STEP_SECONDS

    float_rate = on.rates["fp32"]
    layers = shapes.layers + shapes.vision_layers
    components = 3 if shapes.vision_layers else 2
    compiling = START_SECONDS + components * COMPONENT_SECONDS + layers * LAYER_SECONDS
    compiling += (source_bytes + 2 * shapes.engine_bytes(precision)) / on.hashing / 1e9
    # Compared with torch once, in the graph twice (whole and in chunks), and as it ships.
    runs = 3 * prefill(COMPARED_TOKENS, float_rate)
    runs += 2 * encoding(COMPARED_PATCHES if shapes.vision_layers else 0, float_rate)
    conversions = 2
    if precision == "int8":
        runs += prefill(load.tokens, float_rate) + encoding(load.patches, float_rate)
        compiling += shapes.parameters / on.quantize
        conversions = 3
    compiling += runs + conversions * shapes.parameters / on.convert
    compiling += conversions * source_bytes / DISK_RATE
    calls = COMPARED_CALLS + (load.samples if precision == "int8" else 0)
    compiling += calls * 4 * shapes.parameters / PACKING_RATE
    return Time(compiling, vision, vision + first, tpot)


def _timed(run: Callable[[], Any]) -> float:
    run()
    began = clock.perf_counter()
    run()
    return clock.perf_counter() - began
