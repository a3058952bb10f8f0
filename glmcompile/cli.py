"""The command line: compile, run, bench and inspect. Each command imports what it needs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from glmcompile.errors import ArtifactError, GlmcompileError, InputError

ENGINE = click.argument("engine", type=click.Path(path_type=Path))
THREADS = click.option(
    "--threads", type=click.IntRange(1), help="Threads of the engine; default: every usable core."
)


class _Commands(click.Group):
    """Turns the errors meant for users into one line on stderr and exit code 2."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except GlmcompileError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(2)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "glmcompile":
                raise
            click.echo(
                f"error: this command needs the package {error.name}; "
                "install it with `pip install 'glmcompile[compile]'`.",
                err=True,
            )
            context.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was written.", err=True)
            context.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="glmcompile")
def main() -> None:
    """Compile vision-language checkpoints to INT8 engines with a paged KV cache, and run them."""


@main.command("compile")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Engine directory."
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp32"]),
    default="int8",
    show_default=True,
    help="int8: W8A8 linear layers, int8 embedding and lm_head, as the recipe says.",
)
@click.option(
    "--recipe",
    default="default",
    show_default=True,
    help="A bundled quantization recipe, or a TOML file.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl (prompt, answer, image) to calibrate with; "
    "default: bundled phone screens, or texts for a text model.",
)
@click.option("--target", type=click.Choice(["cpu"]), default="cpu", show_default=True)
@click.option(
    "--kv-dtype",
    type=click.Choice(["int8", "fp32"]),
    help="Type of the KV cache; default: int8 for an int8 engine, fp32 for an fp32 one.",
)
@click.option("--overwrite", is_flag=True, help="Replace the engine that stands at the output.")
def compile_command(
    checkpoint: Path, output: Path, calibration: Path | None, **options: Any
) -> None:
    """Compile a Hugging Face CHECKPOINT directory to an engine.

    The directory holds config.json, safetensors weights, tokenizer, processor and chat template.
    Nothing is downloaded. The engine appears at the output only when it is complete.

    \b
    glmcompile compile AutoGLM-Phone-9B -o phone.engine
    glmcompile compile AutoGLM-Phone-9B -o phone.fp32 --precision fp32
    """
    with _Progress() as progress:
        from glmcompile.compiler import compile_checkpoint

        compile_checkpoint(
            checkpoint, output, calibration=calibration, progress=progress, **options
        )
    from glmcompile.artifact import open_artifact

    artifact = open_artifact(output, verify=False)
    click.echo(f"{output}: {artifact.size / 2**20:.1f} MiB")


@main.command()
@ENGINE
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image the prompt is about; may be repeated.",
)
@click.option("--prompt", required=True, help="The user's message; - reads it from stdin.")
@click.option("--system", help="A system message before it.")
@click.option("--stream", is_flag=True, help="Print the answer as it is generated.")
@click.option("--max-tokens", type=int, help="Longest answer; default: what the context holds.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 means all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--frequency-penalty", type=float, default=0.0, show_default=True)
@click.option("--presence-penalty", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="End the answer before this string; may be repeated.")
@click.option("--stats", is_flag=True, help="Print token counts and timings to stderr.")
@THREADS
def run(
    engine: Path,
    images: tuple[Path, ...],
    prompt: str,
    system: str | None,
    stream: bool,
    stats: bool,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Ask ENGINE one question and print its answer.

    \b
    glmcompile run phone.engine --image screen.png --prompt "Open Settings" --stream
    """
    import glmcompile

    text = _read_stdin() if prompt == "-" else prompt
    parts: Any = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": text}] if images else text
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    with glmcompile.load(engine, threads=threads) as loaded:
        answer = loaded.stream(messages=messages, **sampling)
        for piece in answer:
            if stream:
                click.echo(piece, nl=False)
        completion = answer.completion
        assert completion is not None
        click.echo("" if stream else completion.text)
        if stats:
            record = {"usage": vars(completion.usage), "timings": vars(completion.timings)}
            click.echo(json.dumps(record), err=True)


@main.command()
@ENGINE
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Engine to compare with, usually the fp32 one of the same checkpoint.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl (prompt, answer, image) to judge answers by; "
    "default: the bundled evaluation split.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table as Markdown.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Write a picture (PNG), of a comparison, a roofline or both.",
)
@click.option("--quick", is_flag=True, help="Fewer repetitions and samples.")
@click.option(
    "--roofline",
    is_flag=True,
    help="Also measure how fast this processor reads and multiplies, and which fraction of that "
    "decode, prefill, the linear layers and the vision encoder reach.",
)
@THREADS
def bench(
    engine: Path,
    baseline: Path | None,
    samples: Path | None,
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    quick: bool,
    roofline: bool,
    threads: int | None,
) -> None:
    """Measure ENGINE's speed, memory and accuracy, and how much better it is than the baseline.

    Both engines take turns in one run, so that what else the machine does hits both alike.
    """
    from rich.console import Console

    from glmcompile import bench as benchmark

    if plot is not None and baseline is None and not roofline:
        raise GlmcompileError(
            f"{plot}: a picture takes two engines or a roofline; give --baseline or --roofline too."
        )
    for file in (json_file, markdown, plot):
        if file is not None:  # better now than after minutes of measuring
            _write(file, _probe)
    with _Progress() as progress:
        result = benchmark.run(
            engine,
            baseline,
            quick=quick,
            samples=samples,
            threads=threads,
            roofline=roofline,
            progress=progress,
        )
    Console().print(benchmark.render_table(result))
    if roofline:
        Console().print(benchmark.render_roofline(result))
    if json_file is not None:
        _write(json_file, lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    if markdown is not None:
        _write(markdown, lambda file: file.write_text(benchmark.render_markdown(result)))
    if plot is not None:
        _write(plot, lambda file: benchmark.plot(result, file))


@main.command()
@ENGINE
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
def inspect(engine: Path, as_json: bool) -> None:
    """Verify ENGINE and say what it holds."""
    from glmcompile.artifact import MANIFEST, open_artifact

    artifact = open_artifact(engine)
    if as_json:
        click.echo(json.dumps(artifact.manifest, indent=1))
        return
    from rich.console import Console

    from glmcompile.report import describe

    try:
        description = describe(artifact)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # fields no runtime needs
        raise ArtifactError(
            f"{engine / MANIFEST}: damaged ({error!r}); compile the checkpoint again."
        ) from error
    Console().print(description)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: the prompt is not UTF-8 text ({error}); convert it.") from error


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


class _Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt that can be handled wherever it was raised.

    Once KeyboardInterrupt itself has come out of `eval` or `exec` of a string, as torch and
    transformers use them, CPython ends the process by SIGINT in place of its exit code.
    """


class _Progress:
    """Stages of long work as rich progress bars on stderr.

    A polite kill unwinds like Ctrl-C, so that half-written output is removed. Libraries swallow an
    exception now and then (in a finalizer, in a callback from C), so it is raised again at the next
    stage.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._interrupted = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Progress:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # as nohup and shells' & set it
                self._handlers[number] = handler
                signal.signal(number, self._interrupt)
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def stage(self, name: str, total: int | None = None) -> Callable[[int], None]:
        """See glmcompile.progress.Progress."""
        if self._interrupted:
            raise _Interrupt
        self._finish()
        task = self._task = self._bars.add_task(name, total=total)
        return lambda done: self._bars.update(task, completed=done)

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise _Interrupt

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)
