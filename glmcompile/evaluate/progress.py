"""What long measurements tell of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Whoever shows progress implements this; the compiler reports in the same form."""

    def stage(self, name: str, total: int | None = None) -> Callable[[int], None]:
        """Begin a stage of `total` steps; the returned function takes the steps done."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int | None = None) -> Callable[[int], None]:
        return lambda done: None
