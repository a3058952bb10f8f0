"""Fixtures of the runtime's tests: tiny models and the engines compiled from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import glmcompile
from glmcompile.config import ModelConfig
from glmcompile.families import Family, family_for
from glmcompile.runtime.engine import Engine


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


@dataclass(frozen=True)
class TinyEngine:
    """A tiny checkpoint and the float32 engine compiled from it."""

    checkpoint: Path
    path: Path

    def open(self, **options: Any) -> Engine:
        """Two threads and small pools, unless options say otherwise."""
        defaults = {"threads": 2, "max_sequences": 8, "max_batched_tokens": 512}
        return glmcompile.load(self.path, **{**defaults, "kv_cache_bytes": 8 << 20, **options})


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyEngine]:
    """(family name, precision="fp32") -> TinyEngine, compiled at first use.

    Untied: a random model whose output layer is its embedding repeats its input for ever. In
    float32, so that transformers computes with the engine's weights.
    """
    made: dict[tuple[str, str], TinyEngine] = {}

    def engine(name: str, precision: str = "fp32") -> TinyEngine:
        if (name, precision) not in made:
            import torch

            from tests.checkpoints import write_checkpoint

            directory = tmp_path_factory.mktemp(f"{name}_{precision}")
            write_checkpoint(name, directory / "checkpoint", dtype=torch.float32, tied=False)
            recipe = directory / "short.toml"
            recipe.write_text("[calibration]\nsamples = 4\n")
            tiny = TinyEngine(directory / "checkpoint", directory / "engine")
            options = {"recipe": recipe} if precision == "int8" else {}
            glmcompile.compile(tiny.checkpoint, tiny.path, precision=precision, **options)
            made[name, precision] = tiny
        return made[name, precision]

    return engine
