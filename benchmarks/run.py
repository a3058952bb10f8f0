"""Compiles a scenario's checkpoint in FP32 and INT8, benchmarks them, and keeps the result.

    python benchmarks/run.py reference
    python benchmarks/run.py smollm2 --checkpoint PATH

Writes benchmarks/results/<scenario>.json, .md and .png.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console

import glmcompile
from glmcompile import bench

HERE = Path(__file__).resolve().parent
SCENARIOS = ("reference", "smollm2")


def scenario_checkpoint(scenario: str, work: Path) -> Path:
    """The checkpoint that a scenario measures; SmolLM2's is written to `work`."""
    if scenario == "reference":
        return HERE.parent / "calibration" / "reference"
    from smollm2 import write_checkpoint

    write_checkpoint(work / "smollm2")
    return work / "smollm2"


@click.command(help=__doc__)
@click.argument("scenario", type=click.Choice(SCENARIOS))
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure this checkpoint instead of preparing the scenario's own.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the engines here, or use those that are there; default: a temporary folder.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE / "results",
    show_default="benchmarks/results",
)
@click.option("--threads", type=click.IntRange(1), help="Default: every usable core.")
@click.option("--quick", is_flag=True, help="Fewer repetitions and samples.")
def main(
    scenario: str,
    checkpoint: Path | None,
    work: Path | None,
    results: Path,
    threads: int | None,
    quick: bool,
) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        engines = {precision: folder / f"{scenario}-{precision}" for precision in ("fp32", "int8")}
        missing = [precision for precision, path in engines.items() if not path.is_dir()]
        if missing:
            source = checkpoint or scenario_checkpoint(scenario, Path(temporary))
            for precision in missing:
                console.print(f"Compiling {scenario} to {precision} ...")
                glmcompile.compile(source, engines[precision], precision=precision)
        console.print("Measuring ...")
        result = bench.run(
            engines["int8"], engines["fp32"], quick=quick, threads=threads, roofline=True
        )
    results.mkdir(parents=True, exist_ok=True)
    target = results / scenario
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(bench.render_markdown(result), encoding="utf-8")
    bench.plot(result, target.with_suffix(".png"))
    console.print(bench.render_table(result))


if __name__ == "__main__":
    main()
