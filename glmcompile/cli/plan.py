"""`glmcompile plan`: what a compile and its engine will need, before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmcompile.cli.arguments import BYTES, CALIBRATION, CHECKPOINT, RECIPE, SIZE, TARGET, THREADS
from glmcompile.errors import GlmcompileError

if TYPE_CHECKING:
    from rich.table import Table


@click.command("plan")
@CHECKPOINT
@TARGET
@click.option(
    "--memory", type=BYTES, help="Memory to compile and serve in; default: this machine's."
)
@click.option(
    "--image",
    type=SIZE,
    default="1080x2400",
    show_default=True,
    help="Size of the screenshot that latency is predicted for.",
)
@RECIPE
@CALIBRATION
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path))
@THREADS
def command(
    checkpoint: Path,
    target: str,
    memory: int | None,
    image: tuple[int, int],
    recipe: str,
    calibration: Path | None,
    file: Path | None,
    threads: int | None,
) -> None:
    """Say what CHECKPOINT will need: disk, memory, time to compile, time to answer.

    No weight is read. Latency and time come from a measurement of a few seconds on this machine.

    \b
    glmcompile plan AutoGLM-Phone-9B --memory 24GiB
    """
    from rich.console import Console

    from glmcompile.bench.machine import memory_gb
    from glmcompile.compiler.plan import predict

    found = predict(checkpoint, image, threads, recipe, calibration)
    available = memory if memory is not None else int((memory_gb() or 0) * 1e9)
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(_table(checkpoint, found, available))
    fitting = [name for name, needs in found["precisions"].items() if _fits(needs, available)]
    if not fitting:
        least = min(found["precisions"].values(), key=lambda needs: _most(needs["space"]))
        raise GlmcompileError(
            f"{checkpoint}: no precision fits into {available / 1e9:.1f} GB of memory; "
            f"int8 needs {least['space']['compile_memory'] / 1e9:.1f} GB to compile and "
            f"{least['space']['serve_memory'] / 1e9:.1f} GB to serve."
        )


def _most(space: dict[str, Any]) -> int:
    return max(space["compile_memory"], space["serve_memory"])


def _fits(needs: dict[str, Any], available: int) -> bool:
    return not available or _most(needs["space"]) <= available


def _table(checkpoint: Path, found: dict[str, Any], available: int) -> Table:
    from rich.table import Table

    prompt = found["prompt"]
    table = Table(
        "", *found["precisions"], title=f"{checkpoint}, {found['parameters']:,} parameters"
    )

    def row(title: str, part: str, key: str, scale: float, unit: str) -> None:
        values = [needs[part][key] * scale for needs in found["precisions"].values()]
        table.add_row(f"{title} ({unit})", *(f"{value:,.{_digits(value)}f}" for value in values))

    row("engine on disk", "space", "engine", 1e-9, "GB")
    row("disk while compiling, besides", "space", "compile_disk", 1e-9, "GB")
    row("memory to compile", "space", "compile_memory", 1e-9, "GB")
    row("time to compile", "time", "compile", 1 / 60, "min")
    row("memory to serve, with 16,000 tokens", "space", "serve_memory", 1e-9, "GB")
    row("keys and values of 1,000 tokens", "space", "kv", 1e-6, "MB")
    row("activations of the prompt", "space", "activations", 1e-9, "GB")
    row(f"first token of {prompt['tokens']:,} tokens (TTFT)", "time", "ttft", 1, "s")
    row("of which vision encoding", "time", "vision", 1, "s")
    row("each further token (TPOT)", "time", "tpot", 1e3, "ms")
    if available:
        table.add_row(
            f"fits into {available / 1e9:.1f} GB",
            *("yes" if _fits(needs, available) else "no" for needs in found["precisions"].values()),
        )
    return table


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
