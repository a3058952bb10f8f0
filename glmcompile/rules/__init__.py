"""What follows from a prompt's tokens and its images' grids: named functions, torch-free.

A contract names the rules of its model; compiling finds them and proves them equal to what
transformers computes.
"""

from glmcompile.rules.grids import GRID_RULES
from glmcompile.rules.positions import POSITION_RULES, position_ids
from glmcompile.rules.spans import SPAN_RULES, attended_spans, span_rows

__all__ = [
    "GRID_RULES",
    "POSITION_RULES",
    "SPAN_RULES",
    "attended_spans",
    "position_ids",
    "span_rows",
]
