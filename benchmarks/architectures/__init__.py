"""Tiny random checkpoints of each model type, with the proportions of its published config."""

from benchmarks.architectures.checkpoints import check, needs, types, write_checkpoint
from benchmarks.architectures.configs import differences

__all__ = ["check", "differences", "needs", "types", "write_checkpoint"]
