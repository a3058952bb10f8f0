"""The coverage table is true: rows are made again and compared with what is committed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.coverage import JSON, make_row

SECONDS = 600
# Between them: transformers' own image processor, images that see themselves and windows, and
# recurrent layers beside attention.
SAMPLE = ("llava", "gemma3", "lfm2")


def committed() -> dict[str, dict[str, Any]]:
    return {row["type"]: row for row in json.loads(JSON.read_text())["types"]}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_as_the_table_says(name: str) -> None:
    check(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(set(committed()) - set(SAMPLE)))
def test_every_row_is_as_the_table_says(name: str) -> None:
    check(name)


def check(name: str) -> None:
    row, expected = make_row(name, SECONDS), committed()[name]
    assert (row["parity"], row["torch_free"]) == (expected["parity"], expected["torch_free"]), row
