"""A picture of a comparison: how many times better, and at what accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmcompile.bench.measures import MEASURES
from glmcompile.bench.report import engine_names, headings
from glmcompile.errors import GlmcompileError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable with any colour vision (Okabe and Ito).
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a PNG of a comparison's ratios and accuracy.

    Raises InputError for a result without baseline, GlmcompileError without matplotlib.
    """
    if "ratio" not in result:
        raise InputError("nothing to compare: the result has no baseline; bench with one to plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GlmcompileError(
            "plotting needs matplotlib; pip install 'glmcompile[compile]'"
        ) from error
    # Without pyplot there is no display to look for and nothing to close.
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2.5, 1])
    _ratios(left, result)
    _accuracy(right, result)
    machine = result["machine"]
    caption = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels"
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _ratios(axes: Axes, result: dict[str, Any]) -> None:
    shown = [(m.title, m.value(result["ratio"])) for m in MEASURES]
    bars = [(title, value) for title, value in shown if value is not None][::-1]
    # Behind the bars, so that it does not cross the figures beside the short ones.
    axes.axvline(1, color="grey", linewidth=1, zorder=0)
    drawn = axes.barh([title for title, _ in bars], [value for _, value in bars], color=_BLUE)
    labels = axes.bar_label(drawn, fmt="%.1fx", padding=3)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.margins(x=0.12)
    baseline, engine = headings(result)[1:3]
    axes.set_title(f"How many times better {engine} is than {baseline}")


def _accuracy(axes: Axes, result: dict[str, Any]) -> None:
    names, titles = engine_names(result), headings(result)[1:3]
    match = result["accuracy"].get("exact_match")
    if match:
        values = [100 * match[name]["value"] for name in names]
        below = [100 * (match[n]["value"] - match[n]["low"]) for n in names]
        above = [100 * (match[n]["high"] - match[n]["value"]) for n in names]
        drawn = axes.bar(titles, values, yerr=[below, above], capsize=5, color=[_ORANGE, _BLUE])
        axes.bar_label(drawn, fmt="%.1f %%", padding=4)
        axes.set_ylim(0, 110)
        axes.set_title(f"Exact match (%)\n{match['samples']} samples, 95 % intervals")
        return
    perplexity = result["accuracy"]["teacher_forcing"]["perplexity"]
    drawn = axes.bar(titles, [perplexity[name] for name in names], color=[_ORANGE, _BLUE])
    axes.bar_label(drawn, fmt="%.2f", label_type="center")
    axes.set_title("Perplexity (lower is better)")
