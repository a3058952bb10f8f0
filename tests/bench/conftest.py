"""The engines come from the evaluation's fixture."""

from tests.evaluate.conftest import engine_pair

__all__ = ["engine_pair"]
