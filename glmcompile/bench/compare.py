"""Runs a whole comparison: memory and load time, then accuracy, then speed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glmcompile.artifact import Artifact, is_checkpoint, open_artifact
from glmcompile.bench import footprint, machine
from glmcompile.bench.measures import (
    CONTEXTS,
    PREFILL_TOKENS,
    REQUESTS,
    growth,
    nested,
    ratios,
    summary,
)
from glmcompile.bench.roofline import MEMORY_BUFFER
from glmcompile.bench.roofline import measure as measure_roofline
from glmcompile.bench.workloads import TextStream, Workloads, open_engine, screens
from glmcompile.errors import InputError
from glmcompile.evaluate.accuracy import evaluate, labels
from glmcompile.evaluate.samples import evaluation_samples
from glmcompile.progress import Progress, Silent
from glmcompile.runtime.engine import Engine
from glmcompile.targets.cpu import default_threads

Measurement = Callable[[Engine, int], dict[str, float]]

# From these on a measurement takes long.
LONG_TOKENS = 1024
MANY_REQUESTS = 16


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    repeats: of each single request. batch_repeats: of several at once. long_repeats: of what takes
    longest, long contexts and many requests. footprint_repeats: processes started for each engine.
    samples, texts: of the evaluation, for image and text models. torch_samples: that torch computes
    where a checkpoint is the baseline. memory_buffer: bytes read to find the memory's bandwidth,
    for a roofline.
    """

    repeats: int = 9
    batch_repeats: int = 5
    long_repeats: int = 3
    footprint_repeats: int = 3
    answer_tokens: int = 64
    samples: int = 405
    texts: int = 20
    torch_samples: int = 8
    memory_buffer: int = MEMORY_BUFFER


FULL = Plan()
QUICK = Plan(
    repeats=5,
    batch_repeats=3,
    long_repeats=2,
    footprint_repeats=1,
    answer_tokens=32,
    samples=135,
    texts=6,
    torch_samples=4,
)


def run(
    engine: str | Path,
    baseline: str | Path | None = None,
    *,
    quick: bool = False,
    samples: str | Path | None = None,
    threads: int | None = None,
    roofline: bool = False,
    progress: Progress | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Measure an engine and, in turns with it (A B A B ...), a baseline of the same checkpoint.

    baseline: an engine, or the checkpoint itself, where its float32 engine does not fit into
    memory: then the engine's outputs are compared with torch's, see evaluate.against_torch, under
    "torch" of "accuracy".
    quick: fewer repetitions and samples. plan: exactly this many, instead.
    samples: a folder with prompts, answers and images in place of the bundled evaluation split.
    threads: of both engines; None means every usable core.
    roofline: also measure the processor's ceilings and put the figures against them, see
    glmcompile.bench.roofline; under "roofline" in the result.

    Returns, JSON-serialisable, {"int8": {...}, "fp32": {...}, "ratio": {...}, "accuracy": {...},
    "machine": {...}}: an engine's figures under its precision (a baseline of the same one under
    "<precision> baseline"), timed ones as {"median", "min", "max", "repeats"}; under "ratio" how
    many times better the engine is than the baseline, times and sizes inverted, so above 1 is
    always better. Without a baseline there is neither its part nor a ratio.
    Raises GlmcompileError for engines that cannot be opened or compared.
    """
    progress = progress or Silent()
    plan = plan or (QUICK if quick else FULL)
    threads = threads or default_threads()
    described = machine.describe(threads)
    against_torch = baseline is not None and is_checkpoint(baseline)
    paths = [Path(engine)]
    if baseline is not None and not against_torch:
        paths.append(Path(baseline))
    folder = None if samples is None else Path(samples)
    artifacts = [open_artifact(path) for path in paths]
    _check_comparable(artifacts)
    _check_memory(artifacts)
    if against_torch:
        assert baseline is not None
        from glmcompile.evaluate.against_torch import compare_with_torch, open_baseline

        # Before the minutes of measuring: it may be another engine's.
        source = open_baseline(artifacts[0], Path(baseline), progress)
    footprints = _footprints(paths, plan, threads, folder, progress)
    with ExitStack() as stack:
        engines = [stack.enter_context(open_engine(path, threads)) for path in paths]
        other = engines[1] if len(engines) > 1 else None
        names = [name for name in labels(engines[0], other) if name is not None]
        workloads = make_workloads(engines[0], plan.answer_tokens, folder)
        timed = _speed(engines, workloads, plan, roofline, progress)
        count = plan.texts if engines[0].model.vision is None and folder is None else plan.samples
        if against_torch:
            chosen = evaluation_samples(engines[0].model, folder, plan.torch_samples)
            accuracy = {"torch": compare_with_torch(engines[0], source, chosen, progress)}
        else:
            accuracy = evaluate(engines[0], other, samples=folder, count=count, progress=progress)
    parts: dict[str, Any] = {
        name: nested({**speed, **growth(speed), **memory, "artifact_mb": artifact.size / 1e6})
        for name, speed, memory, artifact in zip(names, timed, footprints, artifacts, strict=True)
    }
    if other is not None:
        # The baseline first, as tables are read.
        parts = {names[1]: parts[names[1]], names[0]: parts[names[0]]}
        parts["ratio"] = ratios(parts[names[0]], parts[names[1]])
    result = {**parts, "accuracy": accuracy, "machine": described}
    if roofline:
        # Once the engines are closed: their graphs are opened again to be traced.
        result["roofline"] = measure_roofline(
            dict(zip(names, paths, strict=True)), parts, threads, progress, plan.memory_buffer
        )
    return result


def make_workloads(
    engine: Engine, answer_tokens: int, samples: Path | None, screen_count: int = 16
) -> Workloads:
    """The prompts for an engine and others of its checkpoint. Raises InputError without images."""
    shown = []
    if engine.model.vision is not None:
        shown = screens(evaluation_samples(engine.model, samples, screen_count), screen_count)
        if not shown:
            raise InputError(f"{samples}: no sample has an image, which timing {engine.path} needs")
    # A tiny context is shared between prompt and answer.
    answer_tokens = max(2, min(answer_tokens, engine.model.context_length // 4))
    return Workloads(TextStream(engine), shown, engine.model.context_length, answer_tokens)


def _footprints(
    paths: Sequence[Path], plan: Plan, threads: int, samples: Path | None, progress: Progress
) -> list[dict[str, Any]]:
    done = progress.stage("Loading in fresh processes", plan.footprint_repeats * len(paths))
    found: list[dict[str, list[float]]] = [{} for _ in paths]
    count = 0
    for _ in range(plan.footprint_repeats):
        for path, figures in zip(paths, found, strict=True):
            _append(figures, footprint.measure(path, threads, plan.answer_tokens, samples))
            count += 1
            done(count)
    return [{key: summary(values) for key, values in figures.items()} for figures in found]


def _measurements(
    workloads: Workloads, plan: Plan, roofline: bool
) -> Iterator[tuple[Measurement, int]]:
    """What is timed and how often; of the lengths, those that the context holds."""
    yield workloads.screenshot if workloads.screens else workloads.text_prompt, plan.repeats
    for tokens in PREFILL_TOKENS:
        if tokens < workloads.context_length:
            repeats = plan.repeats if tokens < LONG_TOKENS else plan.long_repeats
            yield partial(workloads.prefill, tokens=tokens), repeats
    for context in CONTEXTS:
        if context <= workloads.context_length:
            repeats = plan.repeats if context < LONG_TOKENS else plan.long_repeats
            yield partial(workloads.decode, context=context), repeats
    for requests in REQUESTS:
        repeats = plan.batch_repeats if requests < MANY_REQUESTS else plan.long_repeats
        yield partial(workloads.throughput, requests=requests), repeats
    if roofline and workloads.screens:
        yield workloads.encode_phone_screen, plan.long_repeats


def _speed(
    engines: Sequence[Engine],
    workloads: Workloads,
    plan: Plan,
    roofline: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Every workload, the engines in turns within each repetition, after one warm-up of each."""
    measurements = list(_measurements(workloads, plan, roofline))
    done = progress.stage("Timing", sum(repeats for _, repeats in measurements))
    found: list[dict[str, list[float]]] = [{} for _ in engines]
    count = 0
    for measure, repeats in measurements:
        for engine in engines:
            measure(engine, repeats)
        for repetition in range(repeats):
            for engine, figures in zip(engines, found, strict=True):
                _append(figures, measure(engine, repetition))
            count += 1
            done(count)
    return [{key: summary(values) for key, values in figures.items()} for figures in found]


def _append(found: dict[str, list[float]], figures: dict[str, float]) -> None:
    for key, value in figures.items():
        found.setdefault(key, []).append(value)


def _check_memory(artifacts: Sequence[Artifact]) -> None:
    """Raises InputError where engines, open side by side, would not fit into memory."""
    needed, available = sum(artifact.size for artifact in artifacts), machine.available_memory()
    if len(artifacts) > 1 and available is not None and needed > available:
        sizes = " and ".join(f"{each.path} {each.size / 1e9:.1f} GB" for each in artifacts)
        raise InputError(
            f"{sizes}: more than the {available / 1e9:.1f} GB of memory that are available; give "
            "the checkpoint as the baseline, to compare with torch a layer at a time."
        )


def _check_comparable(artifacts: Sequence[Artifact]) -> None:
    """Raises InputError for engines whose outputs and speed say nothing about each other."""
    first = artifacts[0]
    for other in artifacts[1:]:
        if other.manifest["source"]["sha256"] != first.manifest["source"]["sha256"]:
            raise InputError(
                f"{other.path} and {first.path} were compiled from different checkpoints "
                f"({other.manifest['source']['name']} and {first.manifest['source']['name']}); "
                "compare engines of one checkpoint."
            )
