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


BYTES = _Bytes()
