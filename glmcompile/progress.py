"""What long work tells of itself, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Whoever shows progress implements this."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> Callable[[int], None]:
        """Begin a stage of `total` steps; the returned function takes the steps done.

        done: steps that an earlier run took.
        """

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long each stage to come may take, for one estimate over all of them."""

    def note(self, sentence: str) -> None:
        """Tell what the work's user should know of its input."""


class Silent:
    """Shows nothing."""

    def expect(self, seconds: Mapping[str, float]) -> None: ...

    def note(self, sentence: str) -> None: ...

    def stage(self, name: str, total: int | None = None, done: int = 0) -> Callable[[int], None]:
        return lambda done: None
