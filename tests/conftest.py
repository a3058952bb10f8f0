"""Fixtures shared by every test: tiny random checkpoints, made once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAMILIES = ("glm4v", "qwen2_vl", "llama")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family name -> directory of its tiny checkpoint; read-only, made at first use."""
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in made:
            from tests.checkpoints import write_checkpoint

            made[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return checkpoint


@pytest.fixture(params=FAMILIES)
def family_name(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each family."""
    return request.param
