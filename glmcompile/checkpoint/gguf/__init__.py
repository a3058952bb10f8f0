"""GGUF files as checkpoints."""

from __future__ import annotations

from glmcompile.checkpoint.gguf.metadata import write_directory
from glmcompile.checkpoint.gguf.parameters import parameters

__all__ = ["parameters", "write_directory"]
