"""Measures glmcompile and its peers on one checkpoint, in turns in one run, and keeps the result.

    python benchmarks/peers/run.py text
    python benchmarks/peers/run.py agent --peers glmcompile-int8,llama.cpp-q8_0 --quick

Installs each peer into an environment of its own and converts the checkpoint for it, once. Writes
benchmarks/results/peers-<workload>.json, .md and .png.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import environments
import report
import workloads
from catalogue import AGENT, ALL, PEERS, REFERENCE, TEXT, VISION, Peer, Program
from rich.console import Console
from workers.protocol import Worker, WorkerError

from glmcompile.bench import machine
from glmcompile.bench.measures import summary
from glmcompile.targets.cpu import default_threads

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKPOINTS = {TEXT: "smollm2", AGENT: "agent", VISION: "agent"}
REPEATS = {TEXT: 5, AGENT: 3, VISION: 5}
QUICK_REPEATS = 1
COMPARED_TOKENS = 16
FOLDER = click.Path(file_okay=False, path_type=Path)


@dataclass
class Entrant:
    """A peer in this run: its process, and what is known of it so far.

    figures: values of every repetition. answers: tokens of the first one, by measurement.
    failures: messages, by measurement or stage. broken: it cannot be had, so it is not tried again.
    """

    peer: Peer
    checkpoint: Path
    work: Path
    venvs: Path
    threads: int
    python: dict[str | None, Path] = field(default_factory=dict)
    worker: Worker | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    broken: bool = False

    @property
    def model(self) -> Path:
        """What the program loads."""
        if self.peer.converter is None:
            return self.checkpoint
        name = f"{self.peer.converter.worker}-{self.peer.precision}"
        return self.work / "models" / self.checkpoint.name / name

    def install(self) -> None:
        """Make the environments that its programs need."""
        for program in (self.peer.program, self.peer.converter):
            if program is not None and program.environment not in self.python:
                if program.environment is None:
                    self.python[None] = Path(sys.executable)
                else:
                    folder = environments.ensure(program.environment, self.venvs)
                    self.python[program.environment] = environments.python(folder)

    def convert(self) -> None:
        """Write the model that its program loads, unless it is complete."""
        converted = self.model.with_suffix(".complete")
        if self.peer.converter is None or converted.is_file():
            return
        self.model.parent.mkdir(parents=True, exist_ok=True)
        worker = self._start(self.peer.converter)
        try:
            worker.call("prepare", **self._model_arguments())
        finally:
            worker.close()
        converted.touch()

    def load(self) -> None:
        """Start the worker and open the model; it sleeps until it is called."""
        self.worker = self._start(self.peer.program)
        self.packages = self.worker.call("installed")
        arguments = {**self._model_arguments(), "threads": self.threads, **self.peer.options}
        self.settings = self.worker.call("load", **arguments)
        self.worker.pause()

    def call(self, measurement: workloads.Measurement, repetition: int) -> Any:
        """One call of the worker, which is awake for it alone. Raises WorkerError."""
        if self.worker is None:
            self.load()
        assert self.worker is not None
        self.worker.resume()
        arguments = measurement.arguments(repetition)
        answer = self.worker.call(measurement.call, **arguments)
        self.worker.pause()
        if measurement.call == "generate":
            _check_lengths(answer, arguments["tokens"])
        return answer

    def fail(self, where: str, error: Exception) -> None:
        """Note a failure and end the worker; the next call starts a fresh one.

        Folders of this machine are left out of its message, which goes into the results.
        """
        message = str(error)
        for folder in (self.work, self.venvs):
            message = message.replace(f"{folder}/", "")
        self.failures[where] = message
        self.close()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def result(self) -> dict[str, Any]:
        return {
            "settings": {**self.settings, **self.peer.options},
            "packages": self.packages,
            "figures": {key: summary(values) for key, values in self.figures.items()},
            "failures": self.failures,
        }

    def _start(self, program: Program) -> Worker:
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        script = HERE / "workers" / f"{program.worker}_worker.py"
        return Worker(self.python[program.environment], script, logs / f"{self.peer.name}.log")

    def _model_arguments(self) -> dict[str, str]:
        return {
            "checkpoint": str(self.checkpoint),
            "model": str(self.model),
            "precision": self.peer.precision,
        }


def _check_lengths(answers: workloads.Answers, tokens: int) -> None:
    """Raises WorkerError for answers that are shorter than asked for, which would be faster."""
    for answer in answers:
        found = len(answer["tokens"]), len(answer["seconds"])
        if found != (tokens, tokens):
            raise WorkerError(
                f"gave {found[0]} tokens at {found[1]} times; {tokens} were asked for"
            )


def prepare(entrant: Entrant, console: Console) -> None:
    """Install, convert and load; what fails is noted and ends the peer's part."""
    stages = {"install": entrant.install, "convert": entrant.convert, "load": entrant.load}
    for stage, run in stages.items():
        console.print(f"{entrant.peer.name}: {stage}")
        try:
            run()
        except (WorkerError, environments.InstallationError) as error:
            entrant.fail(stage, error)
            entrant.broken = True
            console.print(f"  failed: {error}", markup=False)
            return


def measure(
    entrants: list[Entrant], workload: workloads.Workload, repeats: int, console: Console
) -> None:
    """Every measurement, the peers in turns within each repetition, after a warm-up of each."""
    for measurement in workload.measurements:
        for repetition in range(-1, repeats):
            for entrant in entrants:
                if entrant.broken or measurement.name in entrant.failures:
                    continue
                try:
                    # The warm-up has a prompt of its own.
                    answer = entrant.call(measurement, repetition % (repeats + 1))
                except WorkerError as error:
                    entrant.fail(measurement.name, error)
                    console.print(f"{entrant.peer.name}: {error}", markup=False)
                    continue
                if repetition < 0:
                    continue
                for key, value in measurement.figures(answer).items():
                    entrant.figures.setdefault(key, []).append(value)
                    console.print(
                        f"{measurement.name} {repetition} {entrant.peer.name} {value:.4g}"
                    )
                if repetition == 0 and measurement.call == "generate":
                    entrant.answers[measurement.name] = [each["tokens"] for each in answer]


def agreement(answers: list[list[int]], reference: list[list[int]]) -> dict[str, float]:
    """How many of the first 16 tokens, at most, are the reference's before the first that is not.

    The mean over all answers, and how many tokens were compared.
    """
    compared = min(COMPARED_TOKENS, *(len(each) for each in reference))
    same = []
    for ours, theirs in zip(answers, reference, strict=True):
        pairs = list(zip(ours[:compared], theirs[:compared], strict=True))
        differing = [index for index, (a, b) in enumerate(pairs) if a != b]
        same.append(differing[0] if differing else compared)
    return {"tokens": compared, "same": sum(same) / len(same), "answers": len(same)}


def agreements(entrant: Entrant, reference: Entrant | None) -> dict[str, dict[str, float]]:
    """Agreement with the reference peer in every measurement that both answered."""
    if reference is None:
        return {}
    return {
        name: agreement(answers, reference.answers[name])
        for name, answers in entrant.answers.items()
        if name in reference.answers
    }


def write_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a workload, made by its script in benchmarks/ unless it is there."""
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, str(HERE.parent / f"{name}.py"), str(folder)], check=True)
    return folder


def make_workload(name: str, checkpoint: Path, work: Path) -> workloads.Workload:
    if name == TEXT:
        return workloads.text(checkpoint)
    pictures = work / "pictures"
    return workloads.agent(checkpoint, pictures) if name == AGENT else workloads.vision(pictures)


def choose(workload: str, names: str | None) -> list[Peer]:
    """The peers of a workload, or those named. Raises BadParameter for one that has no part."""
    taking_part = {peer.name: peer for peer in PEERS if workload in peer.workloads}
    if names is None:
        return list(taking_part.values())
    for name in names.split(","):
        if name not in taking_part:
            raise click.BadParameter(
                f"{name!r} is not a peer in {workload}; choose from {', '.join(taking_part)}"
            )
    return [taking_part[name] for name in names.split(",")]


@click.command(help=__doc__)
@click.argument("workload", type=click.Choice(ALL))
@click.option("--peers", help="Names separated by commas; default: all that take part.")
@click.option("--quick", is_flag=True, help="One repetition.")
@click.option("--repeats", type=click.IntRange(1), help="Default: 5; 3 of an agent's steps.")
@click.option("--threads", type=click.IntRange(1), help="Default: every usable core.")
@click.option("--venvs", type=FOLDER, default=ROOT / "build" / "peers", help="Environments.")
@click.option(
    "--work", type=FOLDER, default=ROOT / "build" / "peers", help="Checkpoints, models, logs."
)
@click.option("--results", type=FOLDER, default=HERE.parent / "results")
def main(
    workload: str,
    peers: str | None,
    quick: bool,
    repeats: int | None,
    threads: int | None,
    venvs: Path,
    work: Path,
    results: Path,
) -> None:
    chosen = choose(workload, peers)
    # As an interrupt does: the workers are ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console()
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS[workload])
    threads = threads or default_threads()
    name = CHECKPOINTS[workload]
    checkpoint = write_checkpoint(name, work.resolve() / name)
    plan = make_workload(workload, checkpoint, work.resolve())
    entrants = [
        Entrant(peer, checkpoint, work.resolve(), venvs.resolve(), threads) for peer in chosen
    ]
    try:
        for entrant in entrants:
            prepare(entrant, console)
        described = machine.describe(threads)
        measure(entrants, plan, repeats, console)
    finally:
        for entrant in entrants:
            entrant.close()
    reference = next((e for e in entrants if e.peer.name == REFERENCE), None)
    result = {
        "workload": workload,
        "checkpoint": name,
        "peers": {
            entrant.peer.name: {
                **entrant.result(),
                "agreement": agreements(entrant, reference),
            }
            for entrant in entrants
        },
        "machine": described,
    }
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"peers-{workload}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report.markdown(result, plan.figures), encoding="utf-8")
    report.plot(result, plan.figures, target.with_suffix(".png"))
    console.print(target.with_suffix(".md").read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
