"""Speed, memory, size and accuracy of an engine, alone or against a baseline, in one run.

Light on import, because load times are measured in processes that import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from glmcompile.progress import Progress

__all__ = ["plot", "render_markdown", "render_roofline", "render_table", "run"]


def run(
    engine: str | Path,
    baseline: str | Path | None = None,
    *,
    quick: bool = False,
    samples: str | Path | None = None,
    threads: int | None = None,
    roofline: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an engine, and a baseline in turns with it; see glmcompile.bench.compare.run."""
    from glmcompile.bench import compare

    return compare.run(
        engine,
        baseline,
        quick=quick,
        samples=samples,
        threads=threads,
        roofline=roofline,
        progress=progress,
    )


def render_table(result: dict[str, Any]) -> Table:
    """A result of `run` as a table for the terminal."""
    from glmcompile.bench import report

    return report.render_table(result)


def render_roofline(result: dict[str, Any]) -> Table:
    """The roofline of a result of `run` that has one, as a table for the terminal."""
    from glmcompile.bench import report

    return report.render_roofline(result)


def render_markdown(result: dict[str, Any]) -> str:
    """A result of `run` as Markdown: the table, accuracy, and what it was measured on."""
    from glmcompile.bench import report

    return report.render_markdown(result)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """A result of `run` with a baseline, a roofline or both as a PNG. Needs matplotlib."""
    from glmcompile.bench import plotting

    plotting.plot(result, path)
