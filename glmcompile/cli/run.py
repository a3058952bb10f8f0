"""`glmcompile run`: one question to an engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from glmcompile.cli.arguments import ENGINE, THREADS, VERIFY, verify_engine
from glmcompile.errors import InputError


@click.command("run")
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
@VERIFY
def command(
    engine: Path,
    images: tuple[Path, ...],
    prompt: str,
    system: str | None,
    stream: bool,
    stats: bool,
    threads: int | None,
    verify: bool,
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
    if verify:
        verify_engine(engine)
    with glmcompile.load(engine, threads=threads, verify=False) as loaded:
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


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: the prompt is not UTF-8 text ({error}); convert it.") from error
