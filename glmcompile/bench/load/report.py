"""A load test's result for reading: a table for the terminal, and Markdown."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from glmcompile.bench.load.summary import LATENCIES, STATISTICS

_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
_RATES = {
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
}


def level_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A title and a cell for each level of load, row by row; the first row is the heading."""
    levels = result["levels"]
    rows = [("", *(level["title"] for level in levels))]
    for name in ("answered", "failed", "retries", "unfinished"):
        if name == "answered" or any(level[name] for level in levels):
            rows.append((name, *(str(level[name]) for level in levels)))
    for name, title in _RATES.items():
        rows.append((title, *(_number(level[name]) for level in levels)))
    if result["slo_ms"]:
        rows.append(("goodput (requests/s)", *map(_goodput, levels)))
    for name in LATENCIES:
        for statistic in STATISTICS:
            found = [level[f"{name}_ms"] for level in levels]
            cells = ["" if each is None else _number(each[statistic]) for each in found]
            rows.append((f"{_TITLES[name]} {statistic} (ms)", *cells))
    return rows


def slo_text(result: dict[str, Any]) -> str:
    """The stated objective, for example "TTFT <= 2000 ms, TPOT <= 100 ms"."""
    return ", ".join(f"{_TITLES[name]} <= {most:g} ms" for name, most in result["slo_ms"].items())


def load_table(result: dict[str, Any]) -> Table:
    """A result of `runner.run` as a table for the terminal."""
    (_, *headings), *rows = level_rows(result)
    table = Table(title=f"{result['server']['model']} at {result['server']['url']}")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    last = {"total tokens/s", "TTFT p99 (ms)", "TPOT p99 (ms)", "ITL p99 (ms)"}
    for row in rows:
        table.add_row(*row, end_section=row[0] in last or row[0].startswith("goodput"))
    return table


def load_markdown(result: dict[str, Any]) -> str:
    """A result of `runner.run` as Markdown: the table, and what it was measured on."""
    heading, *rows = level_rows(result)
    lines = [heading, ("---", *("---:" for _ in heading[1:])), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"{note}\n" for note in load_notes(result))


def load_notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table needs to know, a sentence or two each."""
    server, machine, levels = result["server"], result["machine"], result["levels"]
    notes = []
    if result["interrupted"]:
        notes.append("Interrupted: this is what was answered until then.")
    for level in levels:
        for kind, error in level["errors"].items():
            notes.append(f"{level['title']}: {error['count']} x {kind} ({error['first']}).")
    if result["slo_ms"]:
        notes.append(f"Goodput counts answers with {slo_text(result)}.")
    notes.append(f"{_workload_text(result)} Seed {result['workload']['seed']}.")
    version = f", version {server['version']}" if server.get("version") else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    notes.append(
        f"Server: {server['url']}{version}. Client: {machine['cpu']}, {machine['cores']} cores; "
        f"{machine['os']}; Python {machine['python']}, {versions}; at most "
        f"{max(level['client_cpu_percent'] for level in levels):.0f} % of a core; "
        f"{machine['date']}."
    )
    return notes


def _workload_text(result: dict[str, Any]) -> str:
    workload, levels = result["workload"], result["levels"]
    answered = sum(level["answered"] for level in levels)
    said = f"{workload['conversations']} conversations in turn"
    if not workload["conversations"]:
        said = f"{_span(workload['input_tokens'])} tokens of text"
        if workload["image_sizes"]:
            sizes = " or ".join(f"{width}x{height}" for width, height in workload["image_sizes"])
            said += f" and a picture of {sizes}"
        if workload["system_tokens"]:
            said += f" after a shared system prompt of {workload['system_tokens']}"
    said += f", answers of up to {_span(workload['output_tokens'])}"
    if not answered:
        return f"{said}."
    mean = {
        name: sum(level[f"{name}_tokens"] for level in levels) / answered
        for name in ("prompt", "cached", "output")
    }
    return (
        f"{said}; on average {mean['prompt']:.0f} tokens in ({mean['cached']:.0f} of them from "
        f"the server's cache) and {mean['output']:.0f} out, as the server counts."
    )


def _span(span: dict[str, int]) -> str:
    low, high = span["low"], span["high"]
    return str(low) if low == high else f"{low} to {high}"


def _goodput(level: dict[str, Any]) -> str:
    return f"{_number(level['goodput_per_s'])} ({level['goodput_fraction']:.0%})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"
