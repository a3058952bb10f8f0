"""What long work tells of itself, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Whoever shows progress implements this."""

    def stage(self, name: str, total: int | None = None) -> Callable[[int], None]:
        """Begin a stage of `total` steps; the returned function takes the steps done."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int | None = None) -> Callable[[int], None]:
        return lambda done: None
