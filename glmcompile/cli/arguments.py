"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

ENGINE = click.argument("engine", type=click.Path(path_type=Path))
THREADS = click.option(
    "--threads", type=click.IntRange(1), help="Threads of the engine; default: every usable core."
)
