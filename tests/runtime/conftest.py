"""Fixtures of the runtime's tests: tiny models as the runtime sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from glmcompile.contract import Contract, VisionContract

if TYPE_CHECKING:
    from glmcompile.checkpoint import Checkpoint


@dataclass(frozen=True)
class TinyModel:
    """A tiny checkpoint and what the runtime knows of it. name: of CONFIGS."""

    name: str
    directory: Path
    contract: Contract

    @property
    def placeholder(self) -> str | None:
        """The text of one image in a rendered prompt; None for a text model."""
        vision = self.contract.vision
        return vision.placeholder if vision is not None else None

    @property
    def vision(self) -> VisionContract:
        assert self.contract.vision is not None
        return self.contract.vision


@pytest.fixture(scope="session")
def tiny_model(checkpoint_of: Callable[[str], Checkpoint]) -> Callable[[str], TinyModel]:
    """Name of CONFIGS -> TinyModel."""

    def model(name: str) -> TinyModel:
        checkpoint = checkpoint_of(name)
        return TinyModel(name, checkpoint.path, checkpoint.model)

    return model
