"""Fixtures shared by every test: tiny random checkpoints and engines, made once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import onnx_ir as ir

    from glmcompile.checkpoint import Checkpoint
    from tests.engines import TinyEngine

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


@pytest.fixture(scope="session")
def checkpoint_of(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    """family name -> its tiny checkpoint, opened."""
    opened: dict[str, Checkpoint] = {}

    def checkpoint(family: str) -> Checkpoint:
        if family not in opened:
            from glmcompile.checkpoint import open_checkpoint

            opened[family] = open_checkpoint(tiny_checkpoint(family))
        return opened[family]

    return checkpoint


@pytest.fixture(scope="session")
def exported(
    checkpoint_of: Callable[[str], Checkpoint],
) -> Callable[[str], dict[str, ir.Model]]:
    """family name -> its components as exported; read-only."""
    made: dict[str, dict[str, ir.Model]] = {}

    def components(family: str) -> dict[str, ir.Model]:
        if family not in made:
            from glmcompile.export import export_component

            checkpoint = checkpoint_of(family)
            made[family] = {
                name: export_component(checkpoint, name) for name in checkpoint.model.components
            }
        return made[family]

    return components


@pytest.fixture(params=FAMILIES)
def family_name(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each family."""
    return request.param


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyEngine]:
    """(family name, precision="fp32") -> TinyEngine, compiled at first use; read-only.

    Untied: a random model whose output layer is its embedding repeats its input for ever. In
    float32, so that transformers computes with the engine's weights.
    """
    made: dict[tuple[str, str], TinyEngine] = {}

    def engine(name: str, precision: str = "fp32") -> TinyEngine:
        if (name, precision) not in made:
            import torch

            import glmcompile
            from tests.checkpoints import write_checkpoint
            from tests.engines import TinyEngine

            directory = tmp_path_factory.getbasetemp() / f"{name}_engines"
            if not directory.exists():
                checkpoint = directory / "checkpoint"
                write_checkpoint(name, checkpoint, dtype=torch.float32, tied=False)
                (directory / "short.toml").write_text("[calibration]\nsamples = 4\n")
            tiny = TinyEngine(directory / "checkpoint", directory / precision)
            options = {"recipe": directory / "short.toml"} if precision == "int8" else {}
            glmcompile.compile(tiny.checkpoint, tiny.path, precision=precision, **options)
            made[name, precision] = tiny
        return made[name, precision]

    return engine
