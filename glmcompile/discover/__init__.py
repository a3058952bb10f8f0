"""What a transformers model is made of: found by running it once without weights."""

from glmcompile.discover.model import discover

__all__ = ["discover"]
