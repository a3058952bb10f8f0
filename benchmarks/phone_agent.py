"""Has a served model do tasks on the simulated phone, as Open-AutoGLM would, and counts successes.

    pip install openai
    glmcompile serve ENGINE
    python benchmarks/phone_agent.py --url http://127.0.0.1:8000/v1 --output phone.json

The phone and its tasks are those of `calibration`, their layouts those of the evaluation split.
Whether a task is solved is decided by the phone's state alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibration.episodes import Episode, Messages, run_tasks
from calibration.layouts import SPLITS
from calibration.phone_tasks import SCALES, SYSTEM, TASK_KINDS, tasks
from glmcompile.evaluate.intervals import wilson

# What Open-AutoGLM sends, but for the limit, which is 3,000 there and does not matter to answers
# that end.
SAMPLING = {"temperature": 0.0, "top_p": 0.85, "frequency_penalty": 0.2, "max_tokens": 64}


def ask_server(url: str, model: str | None, api_key: str) -> tuple[Callable[[Messages], str], str]:
    """What asks an OpenAI server at `url` and streams its answer, and the model's name.

    model: None takes the first that the server names.
    """
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=api_key)
    name = model or next(iter(client.models.list())).id

    def ask(messages: Messages) -> str:
        stream = client.chat.completions.create(
            model=name,
            messages=messages,  # type: ignore[arg-type]
            stream=True,
            **SAMPLING,  # type: ignore[call-overload]
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    return ask, name


def ask_engine(engine: Any) -> Callable[[Messages], str]:
    """What asks an engine in this process (glmcompile.load)."""

    def ask(messages: Messages) -> str:
        return engine.generate(messages=messages, **SAMPLING).text

    return ask


def _times(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and 90th percentile, in seconds, and the number of steps."""
    if len(seconds) < 2:
        return {"steps": len(seconds), **({"median": seconds[0]} if seconds else {})}
    return {"steps": len(seconds), "median": median(seconds), "p90": quantiles(seconds, n=10)[-1]}


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success with its 95 % interval, overall and by kind; steps; seconds of first and later steps.

    Raises ValueError without episodes.
    """
    kinds = [kind for kind in TASK_KINDS if any(e.task.kind == kind for e in episodes)]
    by_kind = {kind: [e.solved for e in episodes if e.task.kind == kind] for kind in kinds}
    solved = [episode for episode in episodes if episode.solved]
    return {
        "tasks": len(episodes),
        "success": asdict(wilson(len(solved), len(episodes))),
        "success_by_kind": {
            kind: {"solved": sum(right), "tasks": len(right)} for kind, right in by_kind.items()
        },
        "steps_a_task": sum(len(episode.answers) for episode in episodes) / len(episodes),
        "needless_steps_of_solved": sum(len(e.answers) - e.task.steps for e in solved),
        "seconds": {
            "step": _times([s for e in episodes for s in e.seconds]),
            "first_step": _times([e.seconds[0] for e in episodes]),
            "later_step": _times([s for e in episodes for s in e.seconds[1:]]),
        },
    }


def show(summary: dict[str, Any]) -> Table:
    """The summary as a table."""
    table = Table("", "", show_header=False)
    rate = summary["success"]
    table.add_row(
        "success", f"{rate['value']:.1%} (95 % interval {rate['low']:.1%} to {rate['high']:.1%})"
    )
    for kind, count in summary["success_by_kind"].items():
        table.add_row(f"  {kind}", f"{count['solved']} of {count['tasks']}")
    table.add_row("steps a task", f"{summary['steps_a_task']:.2f}")
    for name, times in summary["seconds"].items():
        if "p90" in times:
            text = f"median {times['median']:.3f} s, 90th percentile {times['p90']:.3f} s"
            table.add_row(name.replace("_", " "), text)
    return table


@click.command(help=__doc__)
@click.option("--url", required=True, help="The server, with /v1.")
@click.option("--model", help="Default: the first that the server names.")
@click.option("--api-key", default="none", envvar="OPENAI_API_KEY", show_default=True)
@click.option("--tasks", "count", type=click.IntRange(1), default=200, show_default=True)
@click.option("--split", type=click.Choice(SPLITS), default="evaluation", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scale", type=float, multiple=True, help="Of the screens; default: a mix.")
@click.option(
    "--system",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with another system prompt.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file.")
def main(
    url: str,
    model: str | None,
    api_key: str,
    count: int,
    split: str,
    seed: int,
    scale: tuple[float, ...],
    system: Path | None,
    output: Path | None,
) -> None:
    ask, name = ask_server(url, model, api_key)
    prompt = system.read_text(encoding="utf-8") if system else SYSTEM
    chosen = tasks(split, count, seed, scale or SCALES)
    console = Console()
    running = run_tasks(ask, chosen, prompt)
    episodes = list(track(running, "Working", count, console=console, transient=True))
    summary = summarise(episodes)
    console.print(show(summary))
    if output is not None:
        run = {"model": name, "split": split, "seed": seed, "scales": scale or SCALES, **SAMPLING}
        each = [asdict(episode) for episode in episodes]
        content = {"run": run, "summary": summary, "episodes": each}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
