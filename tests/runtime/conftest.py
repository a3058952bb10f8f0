"""Fixtures of the runtime's tests: tiny models as the runtime sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from glmcompile.config import ModelConfig
from glmcompile.families import Family, family_for


@dataclass(frozen=True)
class TinyModel:
    """A tiny checkpoint and what the runtime knows of it."""

    directory: Path
    family: Family
    config: ModelConfig


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], TinyModel]:
    """family name -> TinyModel."""

    def model(name: str) -> TinyModel:
        import transformers

        directory = tiny_checkpoint(name)
        config = json.loads((directory / "config.json").read_text())
        family = family_for(config)
        processor = directory / "preprocessor_config.json"
        settings = json.loads(processor.read_text()) if processor.is_file() else {}
        filled = transformers.AutoConfig.from_pretrained(directory).to_dict()
        return TinyModel(directory, family, family.model_config(filled, settings, {}))

    return model
