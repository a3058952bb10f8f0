"""Results of a benchmark for reading: a table for the terminal, and Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from glmcompile.bench.measures import MEASURES

_OTHER_PARTS = ("ratio", "accuracy", "machine")


@dataclass(frozen=True)
class Row:
    """One line: a title, one cell per engine, and the comparison ("" where there is none)."""

    title: str
    cells: tuple[str, ...]
    comparison: str = ""


def engine_names(result: dict[str, Any]) -> list[str]:
    """The engines of a result, the baseline first."""
    return [name for name in result if name not in _OTHER_PARTS]


def headings(result: dict[str, Any]) -> list[str]:
    """Of the columns of `rows`."""
    names = engine_names(result)
    shown = [name.upper() if name in ("fp32", "int8") else name for name in names]
    return ["", *shown, *([f"{shown[-1]} is better by"] if len(names) > 1 else [])]


def speed_rows(result: dict[str, Any]) -> list[Row]:
    """The measured figures' medians, with how many times better the engine is."""
    names = engine_names(result)
    rows = []
    for measure in MEASURES:
        values = [measure.value(result[name]) for name in names]
        if all(value is None for value in values):
            continue
        ratio = measure.value(result["ratio"]) if "ratio" in result else None
        rows.append(
            Row(
                f"{measure.title} ({measure.unit})",
                tuple("" if v is None else f"{v:,.{measure.digits}f}" for v in values),
                "" if ratio is None else f"{ratio:.2f}x",
            )
        )
    return rows


def accuracy_rows(result: dict[str, Any]) -> list[Row]:
    """Exact match with the interval of the difference, perplexity, agreement, KL."""
    names = engine_names(result)
    accuracy, rows = result["accuracy"], []
    match = accuracy.get("exact_match")
    if match:
        cells = tuple(f"{match[name]['value']:.1%}" for name in names)
        rows.append(Row(f"exact match, {match['samples']} samples", cells, _difference(match)))
    forced = accuracy["teacher_forcing"]
    scope = f"{forced['tokens']:,} {forced['scope']}"
    increase = forced.get("perplexity_increase")
    rows.append(
        Row(
            f"perplexity, {scope}",
            tuple(_perplexity(forced["perplexity"][name]) for name in names),
            "" if increase is None else f"{increase:+.2%}",
        )
    )
    if "top1_agreement" in forced:
        blank = ("",) * len(names)
        rows.append(Row("top-1 agreement", blank, f"{forced['top1_agreement']:.2%}"))
        reference, engine = headings(result)[1:3]
        divergence = f"{forced['kl_divergence']:.2g} nats"
        rows.append(Row(f"KL({reference} || {engine}) per token", blank, divergence))
    return rows


def _perplexity(value: float) -> str:
    # Models that guess reach any size.
    return f"{value:.3f}" if value < 1e4 else f"{value:.3g}"


def _difference(match: dict[str, Any]) -> str:
    if "difference" not in match:
        return ""
    value, low, high = (100 * match["difference"][key] for key in ("value", "low", "high"))
    return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"


def machine_line(result: dict[str, Any]) -> str:
    """Where and with what the figures were measured."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    commit = f" ({machine['git_commit']})" if machine["git_commit"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, kernels: "
        f"{machine['isa']}; {machine['memory_gb']} GB; {machine['os']}; Python "
        f"{machine['python']}, {versions}{commit}; {machine['date']}"
    )


def render_table(result: dict[str, Any]) -> Table:
    """Medians of both engines side by side, accuracy below, the notes as the caption."""
    table = Table(caption=" ".join(notes(result)), caption_justify="left")
    for index, heading in enumerate(headings(result)):
        table.add_column(heading, justify="left" if index == 0 else "right")
    columns = len(table.columns)
    for rows in (speed_rows(result), accuracy_rows(result)):
        for row in rows:
            table.add_row(*[row.title, *row.cells, row.comparison][:columns])
        table.add_section()
    return table


def render_markdown(result: dict[str, Any]) -> str:
    """The same table in Markdown, and the notes that a reader needs."""
    columns = headings(result)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|",
    ]
    for row in (*speed_rows(result), *accuracy_rows(result)):
        cells = [row.title, *row.cells, row.comparison][: len(columns)]
        # A bar inside a cell would end it.
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", *notes(result), ""]
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table needs to know, a sentence or two each."""
    figures = result[engine_names(result)[-1]]
    lengths = [f"text prompts have {figures['text_prompt_tokens']['median']:.0f} tokens"]
    if "screenshot_prompt_tokens" in figures:
        shown = figures["screenshot_prompt_tokens"]["median"]
        lengths.append(f"screenshot prompts {shown:.0f}, image included")
    said = [
        f"Medians; {', '.join(lengths)}. Every prompt is distinct; prefix reuse and the image "
        "cache are off."
    ]
    if "ratio" in result:
        said[0] += " The engines were measured in turns in one run."
        match = result["accuracy"].get("exact_match")
        if match:
            method = match["difference"]["method"]
            said.append(f"The difference has its {match['confidence']:.0%} interval ({method}).")
    said.append(f"Measured on {machine_line(result)}.")
    return said
