"""Results of a comparison with peers for reading: a Markdown table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from workloads import Figure

from glmcompile.bench.report import machine_line

ENGINE = "glmcompile-int8"
OURS = "glmcompile"
# Distinguishable with any colour vision (Okabe and Ito).
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_COLUMNS = 4


def median(result: dict[str, Any], peer: str, figure: Figure) -> float | None:
    """A peer's median; None where it was not measured."""
    found = result["peers"][peer]["figures"].get(figure.key)
    return None if found is None else float(found["median"])


def best_peer(result: dict[str, Any], figure: Figure) -> str | None:
    """Who is best at a figure, glmcompile's own engines left out; None if nobody was measured."""
    measured = {
        name: value
        for name in result["peers"]
        if not name.startswith(OURS) and (value := median(result, name, figure)) is not None
    }
    choose = max if figure.higher_is_better else min
    return choose(measured, key=lambda name: measured[name]) if measured else None


def lead(result: dict[str, Any], figure: Figure) -> float | None:
    """How many times better the INT8 engine is than the best peer; above 1 is always better."""
    best = best_peer(result, figure)
    ours = median(result, ENGINE, figure) if ENGINE in result["peers"] else None
    if best is None or ours is None:
        return None
    theirs = median(result, best, figure)
    assert theirs is not None
    return ours / theirs if figure.higher_is_better else theirs / ours


def markdown(result: dict[str, Any], figures: Sequence[Figure]) -> str:
    """A row for each figure, a column for each peer, and what failed below."""
    names = list(result["peers"])
    lines = [_row(["", *names, f"{ENGINE} is better by"])]
    lines.append("|---" + "|---:" * (len(names) + 1) + "|")
    for figure in figures:
        cells = [_cell(result, name, figure) for name in names]
        ahead = lead(result, figure)
        against = "" if ahead is None else f"{ahead:.2f}x than {best_peer(result, figure)}"
        lines.append(_row([f"{figure.title} ({figure.unit})", *cells, against]))
    lines += [
        "",
        f"Medians of {_repeats(result)}; the best of each row is bold. All were measured in "
        "turns in one run, with the same tokens, threads and answer lengths, greedily, and nothing "
        "from a cache.",
        "",
        *_failures(result),
        f"Measured on {machine_line(result)}.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _cell(result: dict[str, Any], name: str, figure: Figure) -> str:
    value = median(result, name, figure)
    if value is None:
        return ""
    shown = _shown(value)
    choose = max if figure.higher_is_better else min
    values = [median(result, other, figure) for other in result["peers"]]
    return f"**{shown}**" if value == choose(v for v in values if v is not None) else shown


def _repeats(result: dict[str, Any]) -> str:
    peers = result["peers"].values()
    counts = [figure["repeats"] for peer in peers for figure in peer["figures"].values()]
    most = max(counts, default=0)
    return "1 repetition" if most == 1 else f"{most} repetitions"


def _failures(result: dict[str, Any]) -> list[str]:
    lines = [
        f"- {name}, {where}: {' '.join(message.split())}"
        for name, peer in result["peers"].items()
        for where, message in peer["failures"].items()
    ]
    return ["Failed:", "", *lines, ""] if lines else []


def _row(cells: Sequence[str]) -> str:
    # A bar inside a cell would end it.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plot(result: dict[str, Any], figures: Sequence[Figure], path: Path) -> None:
    """Write a PNG: a panel for each figure, a bar for each peer, lines from minimum to maximum."""
    names = list(result["peers"])
    rows = -(-len(figures) // _COLUMNS)
    canvas = Canvas(figsize=(5 * _COLUMNS, rows * (1.2 + 0.3 * len(names))), layout="constrained")
    # Without pyplot there is no display to look for and nothing to close.
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(rows, _COLUMNS, sharey=True, squeeze=False).flatten()
    for axes, figure in zip(panels, figures, strict=False):
        _panel(axes, result, figure, names[::-1])
    for axes in panels[len(figures) :]:
        axes.set_visible(False)
    described = result["machine"]
    canvas.supxlabel(f"{described['cpu']}, {described['threads']} threads", fontsize=8)
    canvas.savefig(path, dpi=100)


def _panel(axes: Axes, result: dict[str, Any], figure: Figure, names: Sequence[str]) -> None:
    found = [result["peers"][name]["figures"].get(figure.key) for name in names]
    medians = [each["median"] if each else 0.0 for each in found]
    below = [each["median"] - each["min"] if each else 0.0 for each in found]
    above = [each["max"] - each["median"] if each else 0.0 for each in found]
    colours = [_BLUE if name.startswith(OURS) else _ORANGE for name in names]
    drawn = axes.barh(names, medians, xerr=[below, above], color=colours, ecolor="grey")
    failed = ["failed" if result["peers"][name]["failures"] else "" for name in names]
    labels = [_shown(m) if m else other for m, other in zip(medians, failed, strict=True)]
    axes.bar_label(drawn, labels=labels, padding=4)
    axes.margins(x=0.18)
    direction = "higher" if figure.higher_is_better else "lower"
    axes.set_title(f"{figure.title}\n{figure.unit}, {direction} is better", fontsize=9)
