"""Time and memory of compiling a checkpoint, of several working trees in turns.

    python benchmarks/compile.py CHECKPOINT --work FOLDER [--tree OTHER] [--repeats 3]

A tree is run by the environment that it has in .venv (`make demo` sets one up). Adds a part, named
after the checkpoint, to benchmarks/results/compile.json: medians in seconds, and the peak of memory
(VmHWM, mapped pages included) over that of a process that has imported torch.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from watched import Watched  # noqa: E402

RESULT = HERE / "results" / "compile.json"


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option(
    "--tree", "others", multiple=True, type=click.Path(exists=True, path_type=Path),
    help="Another working tree to compare with; repeatable.",
)  # fmt: skip
@click.option("--repeats", default=3, show_default=True)
def main(checkpoint: Path, work: Path, others: tuple[Path, ...], repeats: int) -> None:
    from glmcompile.bench import machine
    from glmcompile.targets.cpu import default_threads

    work.mkdir(parents=True, exist_ok=True)
    engine = work / "compiled.engine"
    trees = [HERE.parent, *(tree.resolve() for tree in others)]
    seconds: dict[Path, list[float]] = {tree: [] for tree in trees}
    peaks = {tree: 0 for tree in trees}
    for _ in range(repeats):
        for tree in trees:
            shutil.rmtree(engine, ignore_errors=True)
            watched = Watched(
                checkpoint, engine, work / "compile.log", python=tree / ".venv/bin/python"
            )
            if watched.wait():
                raise click.ClickException(f"compiling failed: see {work / 'compile.log'}")
            seconds[tree].append(watched.seconds)
            peaks[tree] = max(peaks[tree], watched.peak)
    torch = memory_of_torch()
    rows = [
        {
            "commit": commit(tree),
            "seconds": round(statistics.median(seconds[tree]), 2),
            "spread": [round(min(seconds[tree]), 2), round(max(seconds[tree]), 2)],
            "peak_memory_gb": round(peaks[tree] / 1e9, 3),
            "over_torch_gb": round((peaks[tree] - torch) / 1e9, 3),
        }
        for tree in trees
    ]
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    name = checkpoint.resolve().name
    result[name] = {"trees": rows, "measured_on": machine.describe(default_threads())}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(rows, indent=1))


def memory_of_torch() -> int:
    """Bytes that a process holds once it has imported torch."""
    code = "import torch; from glmcompile.bench import footprint; print(footprint.peak_memory_mb())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(float(found.stdout) * 1e6)


def commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
