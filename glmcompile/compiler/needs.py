"""What a compile and its engine take of disk and memory: arithmetic over shapes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from glmcompile.bench.machine import available_memory
from glmcompile.calibrate.samples import CalibrationSample
from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.geometry import SAMPLED, TOKEN, Geometry
from glmcompile.compiler.samples import calibration_samples, patches_of
from glmcompile.contract import Contract
from glmcompile.errors import ArtifactError
from glmcompile.quantize.schemes import Recipe
from glmcompile.runtime.image_processor import image_processor
from glmcompile.runtime.kv_cache import KVCacheShape

# Tokens of text beside a screenshot, and in a text model's prompt.
PROMPT_TOKENS = 600
# What an engine's process, and a compile's, holds besides weights and activations.
ENGINE_BYTES, COMPILE_BYTES = 200e6, 630e6
# Tokens and patches that are compared with torch (see compiler.samples).
COMPARED_TOKENS, COMPARED_PATCHES = 400, 1100


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


def load_of(checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[CalibrationSample]) -> Load:
    """What a recipe's calibration samples are for this model."""
    encoded = calibration_samples(checkpoint, checkpoint.directory, samples, recipe.max_tokens)
    lengths = [len(each.token_ids) for each in encoded]
    patches = sum(patches_of(checkpoint, image) for each in encoded for image in each.images)
    return Load(len(samples), sum(lengths), patches, max(lengths))


def check_resources(
    checkpoint: Checkpoint,
    shapes: Geometry,
    precision: str,
    load: Load,
    output: Path,
    held: int = 0,
) -> None:
    """Ask for disk and memory before a compile begins.

    load: what calibrates it. held: bytes that an earlier, interrupted compile has on the disk
    already. Raises ArtifactError with the figures where either does not suffice.
    """
    needs = space(shapes, checkpoint.model, precision, Prompt(0, 0), load)
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
    vision = checkpoint.model.vision
    if vision is None or image is None:
        return Prompt(PROMPT_TOKENS, 0)
    made = image_processor(vision, checkpoint.directory)(Image.new("RGB", image))
    return Prompt(PROMPT_TOKENS + made.num_tokens, patches_of(checkpoint, made))


def space(shapes: Geometry, model: Contract, precision: str, prompt: Prompt, load: Load) -> Space:
    """Memory and disk of one precision ("int8" or "fp32"; its cache is of the same type)."""
    engine = shapes.engine_bytes(precision)
    width = 1 if precision == "int8" else 4
    kv = 1000 * KVCacheShape(model, 1, "int8").block_bytes * width
    hidden, compared, quantized = 4 * model.hidden_size, COMPARED_TOKENS, precision == "int8"
    # When the decoder ends: logits of what is compared from torch, from the float32 graph and from
    # what ships; calibration's embeddings, and its hidden states before and behind a layer.
    logits = 4 * model.vocab_size * compared
    end = logits * (2 + quantized) + hidden * (4 * compared + 3 * quantized * load.tokens)
    # When the vision encoder does: torch's layers, calibration's patches. Most of the engine is yet
    # to come.
    patches = COMPARED_PATCHES * (shapes.vision_layers + 4) + 2 * quantized * load.patches
    begin = logits + hidden * (compared * (shapes.layers + 4) + quantized * load.tokens)
    begin += 4 * shapes.vision_width * patches
    to_come = sum(m.bytes(precision) for m in shapes.matrices if m.rows in (TOKEN, SAMPLED))
    work = max(end, begin - to_come)
    # A layer in float32 and what is made of it; of the logits, torch's and ours.
    memory = COMPILE_BYTES + 8.3 * shapes.largest_unit + 2 * logits
    memory = max(memory, COMPILE_BYTES + 6 * load.longest * (hidden + 4 * shapes.inner))
    return Space(engine, int(work), int(memory), kv, _activations(shapes, model, prompt))


def _activations(shapes: Geometry, model: Contract, prompt: Prompt) -> int:
    """What the largest step of the encoder and of the decoder hold at once, in float32."""
    rows = min(prompt.tokens, 2048)
    decoder = rows * (4 * model.hidden_size + shapes.inner)
    vision = prompt.patches * (10 * shapes.vision_width + 3 * shapes.vision_inner // 2)
    # The patches themselves, as they are cut, normalised and read.
    pixels = 3 * prompt.patches * shapes.patch_values
    return 4 * (decoder + vision + pixels)
