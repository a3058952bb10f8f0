"""Float32 and INT8 engines of one tiny checkpoint, for the tests of evaluation and benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import glmcompile


@dataclass(frozen=True)
class EnginePair:
    fp32: Path
    int8: Path


@pytest.fixture(scope="session")
def engine_pair(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], EnginePair]:
    """family name -> its engines, compiled at first use by whichever test comes first."""
    return lambda family: _compiled(tiny_checkpoint(family))


@cache
def _compiled(checkpoint: Path) -> EnginePair:
    pair = EnginePair(
        checkpoint.with_name(f"{checkpoint.name}_fp32"),
        checkpoint.with_name(f"{checkpoint.name}_int8"),
    )
    glmcompile.compile(checkpoint, pair.fp32, precision="fp32")
    glmcompile.compile(checkpoint, pair.int8, precision="int8")
    return pair
