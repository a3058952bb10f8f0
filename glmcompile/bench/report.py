"""Results of a benchmark for reading: a table for the terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from glmcompile.bench.measures import MEASURES

_OTHER_PARTS = ("ratio", "accuracy", "machine", "roofline")


ROOFLINE_HEADINGS = ("", "ms", "op/byte", "GOP/s", "of peak", "GB/s", "of bandwidth")


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
    if "torch" in result["accuracy"]:
        return _torch_rows(result["accuracy"]["torch"])
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


def _torch_rows(torch: dict[str, Any]) -> list[Row]:
    """Errors against torch and, where torch predicts anything, what becomes of predictions."""
    rows = [
        Row(f"error of {name.replace('_', ' ')}, relative to torch's", (f"{error:.2%}",))
        for name, error in torch["relative_error"].items()
    ]
    if "teacher_forcing" in torch:
        forced = torch["teacher_forcing"]
        before, after = (forced["perplexity"][key] for key in ("torch", "engine"))
        rows += [
            Row(f"perplexity, {torch['tokens']:,} tokens", (_perplexity(after),)),
            Row("perplexity, torch", (_perplexity(before),)),
            Row("top-1 agreement with torch", (f"{forced['top1_agreement']:.2%}",)),
            Row("KL(torch || engine) per token", (f"{forced['kl_divergence']:.2g} nats",)),
        ]
    return rows


def _torch_notes(torch: dict[str, Any]) -> list[str]:
    memory = torch["memory"]
    needed = f"{memory['fp32_engine'] / 1e9:.1f} GB"
    available = memory["available"]
    said = f"A float32 engine would need {needed} of memory"
    if available is None:
        said += "; "
    elif memory["fp32_engine"] > available:
        said += f", more than the {available / 1e9:.1f} GB available; "
    else:
        said += f", and {available / 1e9:.1f} GB are available: compile it to compare speed, too; "
    said += (
        f"the engine's outputs were compared with those of the checkpoint's torch modules, run a "
        f"layer at a time in float32, on {torch['samples']} samples."
    )
    if "teacher_forcing" not in torch:
        said += (
            " Torch itself predicts these samples as if by chance, as random weights do, so "
            "nothing is said of accuracy."
        )
    return [said]


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
    """The same tables in Markdown, and the notes that a reader needs."""
    rows = (*speed_rows(result), *accuracy_rows(result))
    lines = _markdown_table(
        headings(result), [[row.title, *row.cells, row.comparison] for row in rows]
    )
    lines += ["", *notes(result), ""]
    if "roofline" in result:
        roofline = result["roofline"]
        for name, engine in roofline["engines"].items():
            titles = [name, *ROOFLINE_HEADINGS[1:]]
            lines += [*_markdown_table(titles, roofline_rows(engine["points"])), ""]
        lines += [*roofline_notes(roofline), ""]
    return "\n".join(lines)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; cells beyond the columns are left out."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|",
    ]
    for cells in rows:
        # A bar inside a cell would end it.
        shown = [cell.replace("|", "\\|") for cell in cells[: len(columns)]]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def render_roofline(result: dict[str, Any]) -> Table:
    """Every point of every engine against the ceilings, which the caption gives."""
    roofline = result["roofline"]
    table = Table(caption=" ".join(roofline_notes(roofline)), caption_justify="left")
    for index, heading in enumerate(ROOFLINE_HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for name, engine in roofline["engines"].items():
        for title, *cells in roofline_rows(engine["points"]):
            table.add_row(f"{name} {title}", *cells)
        table.add_section()
    return table


def roofline_rows(points: list[dict[str, Any]]) -> list[list[str]]:
    """One line a point, its cells those of ROOFLINE_HEADINGS."""
    return [
        [
            f"{point['kind']}, {point['size']}",
            f"{point['ms']:,.2f}",
            f"{point['intensity']:,.0f}",
            f"{point['gop_per_s']:,.0f}",
            f"{point['of_peak']:.0%}",
            f"{point['gb_per_s']:,.1f}",
            f"{point['of_bandwidth']:.0%}",
        ]
        for point in points
    ]


def roofline_notes(roofline: dict[str, Any]) -> list[str]:
    """The ceilings, and what the fractions are of."""
    said = [
        f"Ceilings of {roofline['threads']} threads with {roofline['isa']} instructions: "
        f"{roofline['int8_gop_per_s']:,.0f} GOP/s of int8, "
        f"{roofline['float32_gop_per_s']:,.0f} of float32, "
        f"{roofline['memory_gb_per_s']:.1f} GB/s from memory "
        f"(a buffer of {roofline['memory_buffer_mb']:,.0f} MB)."
    ]
    for name, engine in roofline["engines"].items():
        said.append(
            f"{name}: the peak is that of {engine['peak']}, the bandwidth that of a buffer as "
            f"large as the decoder's weights, {engine['weights_gb_per_s']:.1f} GB/s from "
            f"{engine['weights_mb']:,.0f} MB."
        )
        growth = engine["prefill_growth_without_attention"]
        if growth is not None:
            said.append(
                f"{name}: attention left out, a token of the longest prefill takes {growth:.2f} "
                "times as long as one of the shortest."
            )
    return said


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table needs to know, a sentence or two each."""
    figures = result[engine_names(result)[-1]]
    if "screenshot_prompt_tokens" in figures:
        shown = figures["screenshot_prompt_tokens"]["median"]
        length = f"TTFT and TPOT are of screenshot prompts of {shown:.0f} tokens, image included"
    else:
        shown = figures["text_prompt_tokens"]["median"]
        length = f"TTFT and TPOT are of text prompts of {shown:.0f} tokens"
    said = [
        f"Medians; {length}. Every prompt is distinct; prefix reuse and the image cache are off."
    ]
    if "torch" in result["accuracy"]:
        said += _torch_notes(result["accuracy"]["torch"])
    if "ratio" in result:
        said[0] += " The engines were measured in turns in one run."
        match = result["accuracy"].get("exact_match")
        if match:
            method = match["difference"]["method"]
            said.append(f"The difference has its {match['confidence']:.0%} interval ({method}).")
    said.append(f"Measured on {machine_line(result)}.")
    return said
