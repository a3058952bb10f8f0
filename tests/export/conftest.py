"""Each family's tiny checkpoint exported once per session, and its lowered graphs on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.export import export_component, save_components
from glmcompile.targets.cpu.lower import lower

Exported = dict[str, ir.Model]


@pytest.fixture(scope="session")
def checkpoint_of(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    """family name -> its tiny checkpoint, opened."""
    opened: dict[str, Checkpoint] = {}

    def checkpoint(family: str) -> Checkpoint:
        if family not in opened:
            opened[family] = open_checkpoint(tiny_checkpoint(family))
        return opened[family]

    return checkpoint


@pytest.fixture(scope="session")
def exported(checkpoint_of: Callable[[str], Checkpoint]) -> Callable[[str], Exported]:
    """family name -> its components as exported; read-only."""
    made: dict[str, Exported] = {}

    def components(family: str) -> Exported:
        if family not in made:
            checkpoint = checkpoint_of(family)
            made[family] = {
                name: export_component(checkpoint, name) for name in checkpoint.family.components
            }
        return made[family]

    return components


@pytest.fixture(scope="session")
def lowered(
    exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """family name -> directory of its graphs lowered for the CPU in float32; read-only."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            models = {name: model.clone() for name, model in exported(family).items()}
            for model in models.values():
                lower(model)
            made[family] = tmp_path_factory.mktemp(f"{family}-fp32")
            save_components(models, made[family])
        return made[family]

    return directory
