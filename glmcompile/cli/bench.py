"""`glmcompile bench`: speed, memory and accuracy of an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from glmcompile.cli.arguments import ENGINE, THREADS
from glmcompile.cli.progress import TerminalProgress
from glmcompile.errors import GlmcompileError


@click.command("bench")
@ENGINE
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Engine to compare with, usually the fp32 one of the same checkpoint.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl (prompt, answer, image) to judge answers by; "
    "default: the bundled evaluation split.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table as Markdown.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Write a picture (PNG), of a comparison, a roofline or both.",
)
@click.option("--quick", is_flag=True, help="Fewer repetitions and samples.")
@click.option(
    "--roofline",
    is_flag=True,
    help="Also measure how fast this processor reads and multiplies, and which fraction of that "
    "decode, prefill, the linear layers and the vision encoder reach.",
)
@THREADS
def command(
    engine: Path,
    baseline: Path | None,
    samples: Path | None,
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    quick: bool,
    roofline: bool,
    threads: int | None,
) -> None:
    """Measure ENGINE's speed, memory and accuracy, and how much better it is than the baseline.

    Both engines take turns in one run, so that what else the machine does hits both alike.
    """
    from rich.console import Console

    from glmcompile import bench as benchmark

    if plot is not None and baseline is None and not roofline:
        raise GlmcompileError(
            f"{plot}: a picture takes two engines or a roofline; give --baseline or --roofline too."
        )
    for file in (json_file, markdown, plot):
        if file is not None:  # better now than after minutes of measuring
            _write(file, _probe)
    with TerminalProgress() as progress:
        result = benchmark.run(
            engine,
            baseline,
            quick=quick,
            samples=samples,
            threads=threads,
            roofline=roofline,
            progress=progress,
        )
    Console().print(benchmark.render_table(result))
    if roofline:
        Console().print(benchmark.render_roofline(result))
    if json_file is not None:
        _write(json_file, lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    if markdown is not None:
        _write(markdown, lambda file: file.write_text(benchmark.render_markdown(result)))
    if plot is not None:
        _write(plot, lambda file: benchmark.plot(result, file))


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
    except OSError as error:
        raise GlmcompileError(
            f"{file}: cannot be written ({error.strerror}); choose another."
        ) from error


def _probe(file: Path) -> None:
    """Open a file for writing and leave what there was."""
    existed = file.exists()
    file.open("ab").close()
    if not existed:
        file.unlink()
