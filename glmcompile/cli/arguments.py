"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

ENGINE = click.argument("engine", type=click.Path(path_type=Path))
THREADS = click.option(
    "--threads", type=click.IntRange(1), help="Threads of the engine; default: every usable core."
)
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
TARGET = click.option("--target", type=click.Choice(["cpu"]), default="cpu", show_default=True)
RECIPE = click.option(
    "--recipe",
    default="default",
    show_default=True,
    help="A bundled quantization recipe, or a TOML file.",
)
CALIBRATION = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl (prompt, answer, image) to calibrate with; "
    "default: bundled phone screens, or texts for a text model.",
)
VERIFY = click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare every file of the engine with its SHA-256 first, which reads all of it.",
)
# Verifying an engine of fewer bytes takes no time to speak of.
_LARGE = 1 << 30


def verify_engine(engine: Path) -> None:
    """Compare an engine with its hashes; for a large one with progress.

    Raises ArtifactError.
    """
    from glmcompile.artifact import open_artifact

    artifact = open_artifact(engine, verify=False)
    if artifact.size < _LARGE:
        artifact.verify()
        return
    from glmcompile.cli.progress import TerminalProgress

    with TerminalProgress(time_left=True) as progress:
        artifact.verify(progress.stage(f"Verifying {engine}", artifact.size))


class _Bytes(click.ParamType):
    """A number of bytes: 4GiB, 512MiB, 65536."""

    name = "bytes"

    def convert(self, value: Any, parameter: Any, context: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])i?)?B?", value.strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 4GiB or 512MiB", parameter, context)
        power = " KMGT".index((match[2] or " ").upper())
        return int(float(match[1]) * 1024**power)


class _Size(click.ParamType):
    """Width and height of an image: 1080x2400."""

    name = "size"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)x(\d+)", value.strip())
        if match is None or not int(match[1]) or not int(match[2]):
            self.fail(f"{value!r} is not WIDTHxHEIGHT such as 1080x2400", parameter, context)
        return int(match[1]), int(match[2])


BYTES = _Bytes()
SIZE = _Size()
