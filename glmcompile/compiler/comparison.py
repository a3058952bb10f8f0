"""How far graphs may lie from torch, and quantized layers from the float32 graph; in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import ParityError

_ROWS = 64  # compared at a time, so that logits of a large vocabulary need no copies


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the absolute error, divided by the root mean square of the torch output.

    Both sides compute in float32 and differ in the order of their sums only.
    """

    max_error: float
    mean_error: float


PARITY = {
    "vision_encoder": Tolerance(max_error=1e-3, mean_error=1e-4),
    "decoder": Tolerance(max_error=2e-3, mean_error=1e-4),
}
# Of a quantized layer: the error of its output, divided by what the layer changes of its input
# (root mean squares). W8A8 was seen to give 0.06 at most (layer 1 of SmolLM2-135M, 0.04 in models
# of vision); a wrong scale or a swapped channel gives about 1.
SHIPPED_LIMIT = 0.3


@dataclass(frozen=True)
class Difference:
    """One output compared with torch: errors relative to the root mean square of torch's.

    output: the component's output, or the layer by its module path; call: how it was run.
    where: index of the largest error; expected and actual: the two values there.
    """

    component: str
    output: str
    call: str
    max_error: float
    mean_error: float
    where: tuple[int, ...]
    expected: float
    actual: float

    @property
    def within_tolerance(self) -> bool:
        bound = PARITY[self.component]
        return self.max_error <= bound.max_error and self.mean_error <= bound.mean_error

    def check(self) -> None:
        """Raises ParityError where it is beyond the tolerance."""
        if self.within_tolerance:
            return
        bound = PARITY[self.component]
        raise ParityError(
            f"{self.component}: {self.output} ({self.call}) differs from torch by up to "
            f"{self.max_error:.2g} (mean {self.mean_error:.2g}) of its root mean square, "
            f"allowed {bound.max_error:.2g} (mean {bound.mean_error:.2g}); worst at "
            f"{list(self.where)}: {self.actual:.6g} instead of {self.expected:.6g}. "
            "This is a fault of the export: report it with the checkpoint's config.json."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ShippedError:
    """What a layer of the engine itself loses to quantization, on held-out samples.

    layer_error: of the layer alone, on float32 inputs, relative to what it changes of its input.
    chain_error: of the engine's layers up to this one, relative to the output itself.
    Both are ratios of root mean squares.
    """

    component: str
    output: str
    layer_error: float
    chain_error: float

    def check(self) -> None:
        """Raises ParityError where the layer is broken."""
        if not self.layer_error <= SHIPPED_LIMIT:  # NaN is beyond every limit
            raise ParityError(
                f"{self.component}: {self.output} quantized differs from float32 by "
                f"{self.layer_error:.2g} of what it computes, allowed {SHIPPED_LIMIT:.2g}; keep "
                "it in float32 by an [[override]] of the recipe, or calibrate with samples "
                "that are more like what the model will see."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    component: str,
    output: str,
    call: str,
    expected: NDArray[np.float32],
    actual: NDArray[np.float32],
) -> Difference:
    """Errors of one output [rows, channels]. Raises ParityError when the shapes differ."""
    if expected.shape != actual.shape:
        raise ParityError(
            f"{component}: {output} has shape {list(actual.shape)}; "
            f"torch gives {list(expected.shape)}"
        )
    largest, where, total, squares = -1.0, (0, 0), 0.0, 0.0
    for start, wanted, got in _in_rows(expected, actual):
        error = np.abs(got - wanted)
        error[~np.isfinite(got)] = np.inf
        place = np.unravel_index(int(error.argmax()), error.shape)
        if error[place] > largest:
            largest, where = float(error[place]), (start + int(place[0]), int(place[1]))
        total += float(error.sum())
        squares += float(np.square(wanted).sum())
    scale = float(np.sqrt(squares / expected.size)) or 1.0
    return Difference(
        component,
        output,
        call,
        max_error=largest / scale,
        mean_error=total / expected.size / scale,
        where=where,
        expected=float(expected[where]),
        actual=float(actual[where]),
    )


def relative_error(expected: NDArray[Any], actual: NDArray[Any], change: NDArray[Any]) -> float:
    """Root mean square of the error over that of `change`; all [rows, channels]."""
    error = change_squares = 0.0
    for start, wanted, got in _in_rows(expected, actual):
        part = change[start : start + _ROWS].astype(np.float64)
        error += float(np.square(got - wanted).sum())
        change_squares += float(np.square(part).sum()) * (wanted.size / part.size)
    return float(np.sqrt(error / change_squares)) if change_squares else float(error > 0)


def _in_rows(
    expected: NDArray[Any], actual: NDArray[Any]
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    for start in range(0, len(expected), _ROWS):
        rows = slice(start, start + _ROWS)
        yield start, expected[rows].astype(np.float64), actual[rows].astype(np.float64)
