"""A picture of a result: how many times better, at what accuracy, how close to the ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmcompile.bench.measures import MEASURES
from glmcompile.bench.report import engine_names, headings
from glmcompile.errors import GlmcompileError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with any colour vision (Okabe and Ito).
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_MARKERS = {"decode": "v", "prefill": "s", "linear layers": "o", "vision": "D"}


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a PNG of a comparison's ratios and accuracy, of a roofline, or of both.

    Raises InputError for a result with neither baseline nor roofline, GlmcompileError without
    matplotlib.
    """
    panels: list[tuple[Callable[[Axes, dict[str, Any]], None], float]] = []
    if "ratio" in result:
        panels += [(_ratios, 2.5), (_accuracy, 1)]
    if "roofline" in result:
        panels += [(_roofline, 2.5)]
    if not panels:
        raise InputError(
            "nothing to plot: the result has no baseline and no roofline; bench with one of them"
        )
    widths = [width for _, width in panels]
    figure = new_figure(3 * sum(widths), 6)
    row = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, (draw, _) in zip(row, panels, strict=True):
        draw(axes, result)
    machine = result["machine"]
    caption = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels"
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches. Raises GlmcompileError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GlmcompileError(
            "plotting needs matplotlib; pip install 'glmcompile[bench]'"
        ) from error
    # Without pyplot there is no display to look for and nothing to close.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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


def _roofline(axes: Axes, result: dict[str, Any]) -> None:
    roofline = result["roofline"]
    for (name, engine), color in zip(roofline["engines"].items(), (_BLUE, _ORANGE), strict=False):
        peak = roofline[f"{engine['peak']}_gop_per_s"]
        places = [point["intensity"] for point in engine["points"]]
        _roof(axes, peak, engine["weights_gb_per_s"], places, color=color)
        _roof(axes, peak, roofline["memory_gb_per_s"], places, color=color, linestyle="--")
        for kind, marker in _MARKERS.items():
            shown = [point for point in engine["points"] if point["kind"] == kind]
            if shown:
                _points(axes, shown, label=f"{name} {kind}", color=color, marker=marker)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="GOP/s")
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title("Roofline (dashed: bandwidth of memory)")


def _roof(axes: Axes, peak: float, bandwidth: float, places: list[float], **style: Any) -> None:
    """Straight lines in logarithmic scales: up the bandwidth to the ridge, along the peak."""
    ridge = peak / bandwidth
    low, high = min(*places, ridge) / 2, max(*places, ridge) * 4
    axes.plot([low, ridge, high], [bandwidth * low, peak, peak], linewidth=1, **style)


def _points(axes: Axes, points: list[dict[str, Any]], **style: Any) -> None:
    axes.scatter(
        [point["intensity"] for point in points],
        [point["gop_per_s"] for point in points],
        20,
        **style,
    )
    for point in points:
        axes.annotate(
            point["size"].removesuffix(" tokens"),
            (point["intensity"], point["gop_per_s"]),
            (5, -3),
            textcoords="offset points",
            fontsize=6,
        )
