"""Passages of plain text that calibrate and evaluate models without a vision encoder.

They are from the Python 3.11 documentation (`pydoc_data.topics`, Python Software Foundation
License), one passage a topic; even lines calibrate, odd lines evaluate.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_FIRST_LINE = {"calibration": 0, "evaluation": 1}


def texts(split: str, count: int | None = None) -> Iterator[str]:
    """Yields up to `count` passages of a split, always the same ones in the same order.

    Raises ValueError for a split other than calibration and evaluation.
    """
    if split not in _FIRST_LINE:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(_FIRST_LINE)} was expected")
    lines = Path(__file__).with_name("texts.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = lines[_FIRST_LINE[split] :: 2]
    yield from (json.loads(line)["text"] for line in islice(chosen, count))
