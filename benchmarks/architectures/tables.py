"""Tables keyed by several names at once."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def words(text: str) -> list[str]:
    """The names in a text, separated by blanks."""
    return text.split()


def each(names: str, value: Value) -> dict[str, Value]:
    """{name: value} for every name."""
    return dict.fromkeys(words(names), value)
