"""What an engine holds, as tables for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table

from glmcompile.artifact import Artifact


def describe(artifact: Artifact) -> Group:
    """The manifest of a verified engine: model, files, quantization, parity."""
    manifest, model = artifact.manifest, artifact.model
    first = model.attention[0]
    facts = Table("", "", title=str(artifact.path), show_header=False)
    facts.add_row("architecture", model.architecture)
    facts.add_row("precision", manifest["precision"])
    facts.add_row("target", manifest["target"])
    facts.add_row(
        "decoder",
        f"{len(model.attention)} layers, hidden {model.hidden_size}, {first.heads} heads, "
        f"{first.kv_heads} KV heads of {first.head_size}, vocabulary {model.vocab_size}",
    )
    facts.add_row("context", f"{model.context_length} tokens")
    if (quantization := manifest.get("quantization")) is not None:
        counts = Counter(quantization["layers"].values())
        facts.add_row("layers", ", ".join(f"{count} {name}" for name, count in counts.items()))
        recipe, data = quantization["recipe"], quantization["data"]
        facts.add_row("recipe", f"{recipe['name']}: {recipe['linear']}")
        facts.add_row("KV cache", recipe["kv_cache"]["dtype"])
        facts.add_row("calibration", f"{data['samples']} samples, {data['source']}")
    facts.add_row("source", f"{manifest['source']['name']} {manifest['source']['sha256'][:16]}")
    facts.add_row("tools", ", ".join(f"{k} {v}" for k, v in manifest["tools"].items()))

    files = Table("file", "MiB", "SHA-256", title="files, all verified")
    for name, entry in manifest["files"].items():
        files.add_row(name, f"{entry['bytes'] / 2**20:.2f}", entry["sha256"][:16])

    return Group(facts, files, *_comparisons(manifest))


def _comparisons(manifest: dict[str, Any]) -> list[Table]:
    """Of each component the worst layer and the output: against torch, and after quantizing."""
    parity = Table(
        "component", "output", "max error", "mean error", title="float32 graphs against torch"
    )
    for row in _telling(manifest["parity"], "max_error"):
        parity.add_row(
            row["component"], row["output"], f"{row['max_error']:.1e}", f"{row['mean_error']:.1e}"
        )
    if not manifest.get("shipped"):
        return [parity]
    shipped = Table(
        "component",
        "output",
        "error of the layer",
        "behind all before it",
        title="the engine's layers against float32, on held-out samples",
    )
    for row in _telling(manifest["shipped"], "layer_error"):
        shipped.add_row(
            row["component"],
            row["output"],
            f"{row['layer_error']:.2%}",
            f"{row['chain_error']:.2%}",
        )
    return [parity, shipped]


def _telling(rows: list[dict[str, Any]], error: str) -> list[dict[str, Any]]:
    """Of each component the row with the largest error and the last one, where they differ."""
    found: list[dict[str, Any]] = []
    for component in dict.fromkeys(row["component"] for row in rows):
        own = [row for row in rows if row["component"] == component]
        worst = max(own, key=lambda row: row[error])
        found += [worst] if worst is own[-1] else [worst, own[-1]]
    return found
