"""How close an engine comes to what the processor can do (the roofline model).

Williams, Waterman and Patterson, 2009: a workload of so many operations and so many bytes that it
must read can run no faster than the multipliers and the memory allow, whichever is less. The bytes
are counted as if everything in between stayed in caches: the weights once, the embedding rows, keys
and values once. The operations are those of linear layers and attention, two per
multiply-accumulate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from glmcompile.artifact import Artifact, open_artifact
from glmcompile.bench.ceilings import Ceilings
from glmcompile.bench.machine import memory_gb
from glmcompile.bench.measures import CONTEXTS, PREFILL_TOKENS
from glmcompile.bench.trace import Node, read_trace
from glmcompile.bench.workloads import phone_screen
from glmcompile.contract import Contract
from glmcompile.progress import Progress
from glmcompile.runtime.image_processor import image_processor
from glmcompile.runtime.kv_cache import KVCacheShape
from glmcompile.runtime.model_runner import cache_dtype
from glmcompile.runtime.teacher_forcing import TeacherForcing

MEMORY_BUFFER = 1 << 30  # bytes: more than the caches of most processors hold
REPEATS = 3  # traced runs of each length, after one to warm up


@dataclass(frozen=True)
class Work:
    """operations: two per multiply-accumulate. bytes: read at least."""

    operations: int
    bytes: int


@dataclass(frozen=True)
class Point:
    """One workload against the ceilings.

    kind, size: for example "prefill", "512 tokens". of_peak, of_bandwidth: fractions of the
    multiplication peak and of the read bandwidth. intensity: operations per byte.
    """

    kind: str
    size: str
    operations: int
    bytes: int
    ms: float
    gop_per_s: float
    gb_per_s: float
    intensity: float
    of_peak: float
    of_bandwidth: float


@dataclass(frozen=True)
class TokenBytes:
    """What one token adds to read. row: of the embedding. kv: keys and values of all layers."""

    row: int
    kv: int


def decoder_work(
    nodes: Sequence[Node], model: Contract, token: TokenBytes, tokens: int, past: int = 0
) -> Work:
    """A run of the decoder on `tokens` tokens after `past` ones; `nodes` ran on as many tokens."""
    pairs = tokens * past + tokens * (tokens + 1) // 2
    attention = sum(
        2 * each.heads * (each.head_size + each.value_size) * pairs for each in model.attention
    )
    operations = sum(node.linear_operations for node in nodes) + attention
    return Work(operations, weight_bytes(nodes) + tokens * token.row + (past + tokens) * token.kv)


def linear_work(nodes: Sequence[Node]) -> Work:
    """A run's linear layers."""
    return Work(
        sum(node.linear_operations for node in nodes),
        sum(node.weight_bytes for node in nodes if node.is_linear),
    )


def vision_work(nodes: Sequence[Node]) -> Work:
    """A run of the vision encoder on one image."""
    operations = sum(node.linear_operations + node.attention_operations for node in nodes)
    return Work(operations, weight_bytes(nodes))


def weight_bytes(nodes: Sequence[Node]) -> int:
    """All constants of a run."""
    return sum(node.weight_bytes for node in nodes)


def measure(
    engines: Mapping[str, Path],
    figures: Mapping[str, dict[str, Any]],
    threads: int,
    progress: Progress,
    memory_buffer: int = MEMORY_BUFFER,
) -> dict[str, Any]:
    """Measure the ceilings and put each engine's figures, timed before, against them.

    engines: directories by their names in a result; figures: their parts of it.
    memory_buffer: bytes of the buffer read from memory; less where the machine has too little.
    Returns, JSON-serialisable, the ceilings and under "engines" each one's points.
    """
    done = progress.stage("Roofline", 1 + len(engines))
    with Ceilings(threads) as ceilings:
        size = min(memory_buffer, int((memory_gb() or 4) * 1e9 / 4))
        result: dict[str, Any] = {
            "isa": ceilings.isa,
            "threads": threads,
            "memory_buffer_mb": size / 1e6,
            "memory_gb_per_s": ceilings.read_gb_per_s(size),
            "int8_gop_per_s": ceilings.int8_gop_per_s(),
            "float32_gop_per_s": ceilings.float32_gop_per_s(),
            "engines": {},
        }
        done(1)
        for count, (name, path) in enumerate(engines.items(), start=2):
            result["engines"][name] = _engine(path, figures[name], ceilings, result)
            done(count)
    return result


def _engine(
    path: Path, figures: dict[str, Any], ceilings: Ceilings, measured: dict[str, Any]
) -> dict[str, Any]:
    artifact = open_artifact(path, verify=False)
    traces = Traces(artifact, measured["threads"])
    precision = "int8" if artifact.manifest["precision"] == "int8" else "float32"
    peak = measured[f"{precision}_gop_per_s"]
    weights = weight_bytes(traces.decoder[1][0])
    bandwidth = ceilings.read_gb_per_s(weights)
    timed = _decoder_work(traces, figures) + _linear_work(traces)
    if "phone_screen_encode_ms" in figures:
        milliseconds = figures["phone_screen_encode_ms"]["median"]
        timed.append(("vision", "1080x2400", vision_work(traces.vision), milliseconds))
    return {
        "peak": precision,
        "weights_mb": weights / 1e6,
        "weights_gb_per_s": bandwidth,
        "prefill_growth_without_attention": growth_without_attention(traces.decoder),
        "points": [asdict(point(*each, peak=peak, bandwidth=bandwidth)) for each in timed],
    }


def growth_without_attention(runs: Mapping[int, list[list[Node]]]) -> float | None:
    """What a token of the longest prefill costs over one of the shortest, attention left out.

    runs: by tokens. Close to 1 where work is linear in tokens; None with fewer than two lengths.
    """
    lengths = sorted(tokens for tokens in runs if tokens > 1)
    if len(lengths) < 2:
        return None
    shortest, longest = (
        median(sum(n.seconds for n in run if not n.is_attention) for run in runs[tokens]) / tokens
        for tokens in (lengths[0], lengths[-1])
    )
    return longest / shortest


def point(
    kind: str, size: str, work: Work, milliseconds: float, peak: float, bandwidth: float
) -> Point:
    """peak: GOP/s. bandwidth: GB/s."""
    gop_per_s, gb_per_s = work.operations / milliseconds / 1e6, work.bytes / milliseconds / 1e6
    return Point(
        kind,
        size,
        work.operations,
        work.bytes,
        milliseconds,
        gop_per_s,
        gb_per_s,
        work.operations / work.bytes,
        gop_per_s / peak,
        gb_per_s / bandwidth,
    )


class Traces:
    """Runs of an engine's graphs under ONNX Runtime's profiler, for a prompt of each length.

    decoder: by tokens, the runs after a warm-up. vision: a run on a phone's screen; empty for a
    text model.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.model = model = artifact.model
        lengths = [n for n in (1, *PREFILL_TOKENS) if n <= model.context_length]
        with tempfile.TemporaryDirectory() as folder:
            forcing = TeacherForcing(artifact.path, model, threads, profile=Path(folder))
            for tokens in lengths:
                for _ in range(1 + REPEATS):
                    forcing([0] * tokens, rows=[tokens - 1])
            if model.vision is not None:
                forcing.encode([image_processor(model.vision, artifact.path)(phone_screen())])
            runs = {
                component: read_trace(Path(session.end_profiling()))
                for component, session in forcing.sessions.items()
            }
            kv = KVCacheShape(model, 1, cache_dtype(forcing.sessions["decoder"])).block_bytes
        quantized = any(node.op == "EmbeddingW8" for node in runs["decoder"][0])
        self.token = TokenBytes(model.hidden_size * (1 if quantized else 4), kv)
        each = 1 + REPEATS
        self.decoder = {
            tokens: runs["decoder"][each * index + 1 : each * (index + 1)]
            for index, tokens in enumerate(lengths)
        }
        self.vision = runs["vision_encoder"][0] if model.vision is not None else []


def _decoder_work(traces: Traces, figures: dict[str, Any]) -> list[tuple[str, str, Work, float]]:
    """What was timed with the whole engine: (kind, size, work, milliseconds)."""
    timed = []
    for context in CONTEXTS:
        if rate := figures.get("decode_tokens_per_s", {}).get(str(context)):
            nodes = traces.decoder[1][0]
            work = decoder_work(nodes, traces.model, traces.token, 1, past=context - 1)
            timed.append(("decode", f"context {context:,}", work, 1e3 / rate["median"]))
    for tokens in PREFILL_TOKENS:
        if rate := figures.get("prefill_tokens_per_s", {}).get(str(tokens)):
            nodes = traces.decoder[tokens][0]
            work = decoder_work(nodes, traces.model, traces.token, tokens)
            milliseconds = 1e3 * tokens / rate["median"]
            timed.append(("prefill", f"{tokens:,} tokens", work, milliseconds))
    return timed


def _linear_work(traces: Traces) -> list[tuple[str, str, Work, float]]:
    """The decoder's linear layers alone, by their traces.

    Not of one token: traced, so small layers can take longer than a whole step does untraced.
    Decode at a short context, nearly all of whose bytes are theirs, stands for them.
    """
    return [
        (
            "linear layers",
            f"{tokens:,} tokens",
            linear_work(runs[0]),
            1e3 * median(sum(node.seconds for node in run if node.is_linear) for run in runs),
        )
        for tokens, runs in traces.decoder.items()
        if tokens > 1
    ]
