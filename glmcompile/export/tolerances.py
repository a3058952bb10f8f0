"""How far an exported component's outputs may lie from its torch module's, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the absolute error, divided by the root mean square of the torch output.

    Both sides compute in float32 and differ in the order of their sums only.
    """

    max_error: float
    mean_error: float


PARITY = {
    "vision_encoder": Tolerance(max_error=1e-3, mean_error=1e-4),
    "embedding": Tolerance(max_error=0.0, mean_error=0.0),
    "decoder": Tolerance(max_error=2e-3, mean_error=1e-4),
}
