"""Checkpoints as they are published: opened, validated, and read one parameter at a time."""

from __future__ import annotations

from glmcompile.checkpoint.opened import Checkpoint
from glmcompile.checkpoint.opening import open_checkpoint
from glmcompile.checkpoint.sources import Source, StoredTensor

__all__ = ["Checkpoint", "Source", "StoredTensor", "open_checkpoint"]
