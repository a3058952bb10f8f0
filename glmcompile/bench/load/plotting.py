"""A picture of a load test: latency and throughput against load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmcompile.bench.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOADS = {"concurrency": "clients at once", "rate": "requests offered per second"}
# Distinguishable with any colour vision (Okabe and Ito).
_STYLES = {"p50": ("#0072B2", "o"), "p90": ("#E69F00", "s"), "p99": ("#D55E00", "^")}
_PANELS = {"ttft_ms": "TTFT (ms)", "tpot_ms": "TPOT (ms)", "e2e_ms": "end-to-end latency (ms)"}


def plot_load(result: dict[str, Any], path: str | Path) -> None:
    """Write the result of a `runner.run` as a PNG, a row of panels for each kind of load.

    Raises GlmcompileError without matplotlib.
    """
    levels = {
        kind: sorted(
            (level for level in result["levels"] if kind in level["load"]),
            key=lambda level: level["load"][kind],
        )
        for kind in _LOADS
    }
    shown = {kind: members for kind, members in levels.items() if members}
    figure = new_figure(4 * (len(_PANELS) + 1), 4 * len(shown))
    grid = figure.subplots(len(shown), len(_PANELS) + 1, squeeze=False)
    for row, (kind, members) in zip(grid, shown.items(), strict=True):
        loads = sorted({level["load"][kind] for level in members})
        for axes, (name, title) in zip(row, _PANELS.items(), strict=False):
            _latency(axes, members, kind, name)
            axes.set(title=title, ylim=(0, None))
        _throughput(row[-1], members, kind, bool(result["slo_ms"]))
        for axes in row:
            axes.set(xlabel=_LOADS[kind], xticks=loads, xticklabels=[f"{load:g}" for load in loads])
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    server, machine = result["server"], result["machine"]
    figure.supxlabel(f"{server['model']} at {server['url']}; {machine['cpu']}", fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _latency(axes: Axes, levels: list[dict[str, Any]], kind: str, name: str) -> None:
    known = [level for level in levels if level[name] is not None]
    loads = [level["load"][kind] for level in known]
    for statistic, (color, marker) in _STYLES.items():
        values = [level[name][statistic] for level in known]
        axes.plot(loads, values, color=color, marker=marker, label=statistic)


def _throughput(axes: Axes, levels: list[dict[str, Any]], kind: str, goodput: bool) -> None:
    """Requests on the left, tokens on the right."""
    loads = [level["load"][kind] for level in levels]
    requests = [level["requests_per_s"] for level in levels]
    axes.plot(loads, requests, color="#0072B2", marker="o", label="requests/s")
    if goodput:
        good = [level["goodput_per_s"] for level in levels]
        axes.plot(loads, good, color="#009E73", marker="D", label="goodput (requests/s)")
    tokens = axes.twinx()
    values = [level["output_tokens_per_s"] for level in levels]
    # Both in one legend, which the left axis draws.
    tokens.plot(loads, values, color="#E69F00", marker="s", linestyle="--")
    axes.plot([], [], color="#E69F00", marker="s", linestyle="--", label="output tokens/s (right)")
    axes.set(title="throughput", ylim=(0, 1.1 * max(requests) or 1))
    # Answers of one length have tokens in proportion to requests; another scale parts the lines.
    tokens.set(ylim=(0, 1.4 * max(values) or 1))
