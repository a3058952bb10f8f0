"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmcompile.errors import CheckpointError


def read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    """A file's JSON object; empty where an optional file is missing. Raises CheckpointError."""
    if not file.is_file():
        if optional:
            return {}
        raise CheckpointError(
            f"{file} is missing; a checkpoint directory needs it (was the download complete?)"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data
