"""Engines compiled from tiny checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glmcompile
from glmcompile.runtime.engine import Engine


@dataclass(frozen=True)
class TinyEngine:
    """A tiny checkpoint and an engine compiled from it."""

    checkpoint: Path
    path: Path

    def open(self, **options: Any) -> Engine:
        """Two threads and small pools, unless options say otherwise."""
        defaults = {"threads": 2, "max_sequences": 8, "max_batched_tokens": 512}
        return glmcompile.load(self.path, **{**defaults, "kv_cache_bytes": 8 << 20, **options})


def wait_until_idle(engine: Engine, seconds: float = 60) -> None:
    """Until no request is running or waiting."""
    end = time.monotonic() + seconds
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < end, stats
        time.sleep(0.002)
