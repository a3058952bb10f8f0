"""`glmcompile bench`: an engine's speed, memory and accuracy, or a server under load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from glmcompile.cli.groups import GroupedCommand, GroupedOption, given_options, group_values
from glmcompile.cli.load import GROUP as LOAD
from glmcompile.cli.load import load_options, load_test
from glmcompile.cli.progress import TerminalProgress
from glmcompile.errors import GlmcompileError, InputError

_ENGINE = "Options of an engine's measurement (ENGINE)"


@click.command("bench", cls=GroupedCommand)
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option(
    "--baseline",
    cls=GroupedOption,
    group=_ENGINE,
    type=click.Path(path_type=Path),
    help="Engine to compare with, usually the fp32 one of the same checkpoint; or the checkpoint, "
    "where that does not fit into memory: torch then runs a layer at a time.",
)
@click.option(
    "--samples",
    cls=GroupedOption,
    group=_ENGINE,
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl (prompt, answer, image) to judge answers by; "
    "default: the bundled evaluation split.",
)
@click.option(
    "--quick",
    cls=GroupedOption,
    group=_ENGINE,
    is_flag=True,
    help="Fewer repetitions and samples.",
)
@click.option(
    "--roofline",
    cls=GroupedOption,
    group=_ENGINE,
    is_flag=True,
    help="Also measure how fast this processor reads and multiplies, and which fraction of that "
    "decode, prefill, the linear layers and the vision encoder reach.",
)
@click.option(
    "--threads",
    cls=GroupedOption,
    group=_ENGINE,
    type=click.IntRange(1),
    help="Threads of the engine; default: every usable core.",
)
@click.option("--url", help="Load the OpenAI-compatible server at this address.")
@load_options
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table as Markdown.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Write a picture (PNG), of a comparison, a roofline or both, or of latency and "
    "throughput against load.",
)
@click.pass_context
def command(
    context: click.Context,
    engine: Path | None,
    url: str | None,
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    **_: Any,
) -> None:
    """Measure ENGINE's speed, memory and accuracy, or load the server at --url.

    An engine and its baseline take turns in one run, so that what else the machine does hits both
    alike. The server is any that speaks OpenAI's chat completions; each number after
    --concurrency and --rate is a level of load that is measured in turn.

    \b
    glmcompile bench phone.engine --baseline phone.fp32 --json report.json
    glmcompile bench --url http://127.0.0.1:8000 --concurrency 1,4,16 --image 1080x2400
    glmcompile bench --url http://127.0.0.1:8000 --rate 0.5,1,2 --duration 60 --plot load.png
    """
    from rich.console import Console

    if engine is not None and url is not None:
        raise InputError(f"{engine} and --url {url}: measure an engine or a server; give one.")
    if engine is None and url is None:
        raise InputError("nothing to measure: give an ENGINE, or a server's address by --url.")
    given, other = given_options(context, _ENGINE), given_options(context, LOAD)
    if url is not None:
        given, other = other, given
    if other:
        meant, found = ("an ENGINE", f"--url {url}") if url else ("--url", f"the engine {engine}")
        raise InputError(f"{', '.join(other)} and {found}: only {meant} takes such options.")
    if plot is not None and url is None and not _has_picture(group_values(context, _ENGINE)):
        raise GlmcompileError(
            f"{plot}: a picture takes two engines or a roofline; give a second engine as the "
            "--baseline, or --roofline."
        )
    for file in (json_file, markdown, plot):
        if file is not None:  # better now than after minutes of measuring
            _write(file, _probe)
    if url is None:
        assert engine is not None
        report = _measure_engine(engine, group_values(context, _ENGINE))
    else:
        report = _load_server(url, given, group_values(context, LOAD))
    console = Console()
    for each in report.shown:
        console.print(each, markup=False)
    if json_file is not None:
        _write(json_file, lambda file: file.write_text(json.dumps(report.result, indent=1) + "\n"))
    if markdown is not None:
        _write(markdown, lambda file: file.write_text(report.markdown))
    if plot is not None:
        _write(plot, report.plot)
    if report.result.get("interrupted"):
        context.exit(130)


@dataclass(frozen=True)
class _Report:
    """What was measured, and its forms: for the terminal, as Markdown, and written as a picture."""

    result: dict[str, Any]
    shown: Sequence[Any]
    markdown: str
    plot: Callable[[Path], None]


def _has_picture(options: dict[str, Any]) -> bool:
    from glmcompile.artifact import is_checkpoint

    baseline = options["baseline"]
    return options["roofline"] or (baseline is not None and not is_checkpoint(baseline))


def _measure_engine(engine: Path, options: dict[str, Any]) -> _Report:
    from glmcompile import bench

    with TerminalProgress() as progress:
        result = bench.run(engine, progress=progress, **options)
    shown = [bench.render_table(result)]
    if options["roofline"]:
        shown.append(bench.render_roofline(result))
    return _Report(
        result, shown, bench.render_markdown(result), lambda file: bench.plot(result, file)
    )


def _load_server(url: str, given: list[str], options: dict[str, Any]) -> _Report:
    from glmcompile.bench.load import plotting, report, runner

    test = load_test(url, given, options)
    with TerminalProgress(time_left=True) as progress:
        result = runner.run(test, progress)
    return _Report(
        result,
        [report.load_table(result), *report.load_notes(result)],
        report.load_markdown(result),
        lambda file: plotting.plot_load(result, file),
    )


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
    except OSError as error:
        raise GlmcompileError(
            f"{file}: cannot be written ({error.strerror}); choose another."
        ) from error


def _probe(file: Path) -> None:
    """Open a file for writing and leave what there was."""
    existed = file.exists()
    file.open("ab").close()
    if not existed:
        file.unlink()
