"""Times the attention operators alone, the variants of each shape in turns; medians.

    python benchmarks/kernels/attention.py
    python benchmarks/kernels/attention.py --shape decode --isa avx2 --isa avx512

A rate counts two multiply-adds for each query, key a query sees, and channel. GB/s counts one read
of the keys and values, as int8 in a cache and float32 otherwise.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from glmcompile.bench.rates import PAGED_INPUTS
from glmcompile.native import library_path

Array = NDArray[Any]

BLOCK_SIZE = 32  # the engine's
TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int32": TensorProto.INT32}
VARLEN_INPUTS = ("query", "key", "value", "cu_seqlens")


@dataclass(frozen=True)
class Shape:
    """`sequences` sequences, each with `new` query tokens that see up to `past + new` keys."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    new: int
    past: int = 0
    sequences: int = 1
    paged: bool = True

    def __str__(self) -> str:
        context = f"{self.new}" if not self.past else f"{self.new} after {self.past}"
        batch = f"{self.sequences} x " if self.sequences > 1 else ""
        return f"{self.name} {batch}{context}, {self.heads}/{self.kv_heads} x {self.head_size}"

    @property
    def flops(self) -> float:
        seen = self.past + (self.new + 1) / 2 if self.paged else self.new
        return 4.0 * self.sequences * self.new * seen * self.heads * self.head_size

    @property
    def bytes(self) -> float:
        channels = 2 * self.kv_heads * self.head_size * (1 if self.paged else 4)
        return float(self.sequences * (self.past + self.new) * channels)

    def feed(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        tokens, size = self.sequences * self.new, self.head_size

        def activations(heads: int) -> Array:
            return rng.standard_normal((tokens, heads * size), dtype=np.float32)

        ends = np.arange(self.sequences + 1, dtype=np.int32) * self.new
        feed = {
            "query": activations(self.heads),
            "key": activations(self.kv_heads),
            "value": activations(self.kv_heads),
        }
        if not self.paged:
            return {**feed, "cu_seqlens": ends}
        pages = -(-(self.past + self.new) // BLOCK_SIZE)
        cache = (self.sequences * pages, BLOCK_SIZE, self.kv_heads, size)
        return {
            **feed,
            "key_cache": rng.integers(-127, 128, cache, np.int8),
            "value_cache": rng.integers(-127, 128, cache, np.int8),
            "cumulative_sequence_length": ends,
            "past_seqlens": np.full(self.sequences, self.past, np.int32),
            "block_table": rng.permutation(cache[0]).astype(np.int32).reshape(-1, pages),
            "k_scale": np.full((self.kv_heads, 1, size), 0.02, np.float32),
            "v_scale": np.full((self.kv_heads, 1, size), 0.02, np.float32),
        }


SHAPES = (
    Shape("vision", 12, 12, 128, 13_000, paged=False),
    Shape("vision", 12, 12, 64, 13_000, paged=False),
    Shape("vision", 12, 12, 128, 1_024, paged=False),
    *(Shape("prefill", 9, 3, 64, new) for new in (512, 4_096)),
    *(Shape("prefill", 16, 4, 128, new) for new in (512, 4_096)),
    *(Shape("decode", 9, 3, 64, 1, past, n) for past in (63, 1_023, 4_095) for n in (1, 16)),
    *(Shape("decode", 16, 4, 128, 1, past, n) for past in (1_023, 4_095) for n in (1, 16)),
)


class Variant:
    """One build of the library, instruction set and least precision, opened for one shape."""

    def __init__(
        self, shape: Shape, library: Path, isa: str, precision: str, threads: int,
        feed: Mapping[str, Array],
    ) -> None:  # fmt: skip
        attributes: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        if shape.paged:
            op, domain, names = "PagedAttention", "com.microsoft", PAGED_INPUTS
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        else:
            op, domain, names = "VarlenAttention", "com.glmcompile", VARLEN_INPUTS
            attributes["compute_type"] = precision
        inputs = [
            helper.make_tensor_value_info(n, TYPES[str(a.dtype)], a.shape) for n, a in feed.items()
        ]
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
        node = helper.make_node(op, names, ["output"], domain=domain, **attributes)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(domain, 1)]
        model = helper.make_model(
            helper.make_graph([node], "attention", inputs, [output]),
            opset_imports=opsets, ir_version=10,
        )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads of one variant must not take the cores of the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(str(library))
        with mock.patch.dict(os.environ, {"GLMCOMPILE_ISA": isa}):
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        self._session, self._binding = session, session.io_binding()
        for name, array in feed.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._binding.bind_output("output")

    def seconds(self) -> float:
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def measure(variants: list[Variant], budget: float) -> list[float]:
    """Median seconds of each variant, run in turns for about `budget` seconds, thrice at least."""
    for variant in variants:
        variant.seconds()
    times: list[list[float]] = [[] for _ in variants]
    deadline = time.perf_counter() + budget
    while len(times[0]) < 3 or time.perf_counter() < deadline:
        for variant, taken in zip(variants, times, strict=True):
            taken.append(variant.seconds())
    return [statistics.median(taken) for taken in times]


def results(
    shapes: list[Shape], labels: list[tuple[Path, str, str]], threads: int, budget: float
) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        feed = shape.feed()
        variants = [Variant(shape, *label, threads, feed) for label in labels]
        medians = measure(variants, budget)
        for (library, isa, precision), seconds in zip(labels, medians, strict=True):
            yield {
                "shape": str(shape),
                "library": library.name,
                "isa": isa or "best",
                "precision": "int8" if shape.paged else precision,
                "ms": seconds * 1e3,
                "gflops": shape.flops / seconds / 1e9,
                "gbs": shape.bytes / seconds / 1e9,
                "speedup": medians[0] / seconds,
            }


@click.command(help=__doc__)
@click.option("--shape", "wanted", default="", help="Only shapes whose name contains this.")
@click.option("--isa", "isas", multiple=True, default=[""], help="GLMCOMPILE_ISA; repeatable.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=["int8"],
    type=click.Choice(["int8", "float32"]),
    help="Of the vision shapes; repeatable.",
)
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another build to compare; repeatable. Default: the installed one.",
)
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="To spend on each shape.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path))
def main(
    wanted: str, isas: list[str], precisions: list[str], libraries: list[Path], threads: int,
    seconds: float, target: Path | None,
) -> None:  # fmt: skip
    labels = [
        (library, isa, precision)
        for library in libraries or [library_path()]
        for isa in isas
        for precision in precisions
    ]
    table = Table(title=f"Attention, {threads} threads, medians")
    columns = ("shape", "library", "isa", "precision", "ms", "GFLOP/s", "GB/s", "speedup")
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:4] else "right")
    rows = []
    for row in results([s for s in SHAPES if wanted in str(s)], labels, threads, seconds):
        rows.append(row)
        table.add_row(*(v if isinstance(v, str) else f"{v:.3g}" for v in row.values()))
    Console(width=120).print(table)
    if target is not None:
        target.write_text(json.dumps({"threads": threads, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
