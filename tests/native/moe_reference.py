"""References of MoE in float64, with the error that float32 sums may have, and its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tests.native import linear_reference
from tests.native.linear_reference import one_node_session

Float = NDArray[np.float64]

# Values of GLMCOMPILE_ISA that select kernels of MoE's own.
ISAS = ("portable", "avx2", "avx512")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")
INPUTS = ("x", "top_k_index", "top_k_weights", "up", "down")
OPTIONAL = ("up_bias", "down_bias")

# Tokens of long prefills, each part short enough to be processed at once.
HALVES = (slice(None, 500), slice(500, None))

# Relative to the sum of the magnitudes that enter a result.
RTOL = 1e-6
# The steepest slope of the activations but relu2.
SLOPE = 1.2


@dataclass
class Gating:
    """What happens between an expert's two layers, as the operators' attributes say it."""

    activation: str = "silu"
    gated: bool = True
    alpha: float | None = None
    limit: float = 0.0
    limit_activated: bool = False

    def attributes(self) -> dict[str, Any]:
        values: dict[str, Any] = {"activation": self.activation, "gated": int(self.gated)}
        if self.alpha is not None:
            values["alpha"] = self.alpha
        if self.limit:
            values |= {"limit": self.limit, "limit_activated": int(self.limit_activated)}
        return values

    def _activated(self, x: Float) -> tuple[Float, Float]:
        """The activation and a bound of its slope."""
        if self.activation == "clamped_swiglu":
            assert self.alpha is not None
            return x / (1 + np.exp(np.clip(-self.alpha * x, -700, 700))), np.full_like(x, SLOPE)
        if self.activation.startswith("relu"):
            positive = np.maximum(x, 0)
            if self.activation == "relu2":
                return positive**2, 2 * positive + 1e-3
            return positive, np.ones_like(x)
        return linear_reference.activate(x, self.activation), np.full_like(x, SLOPE)

    def apply(self, pre: Float, error: Float) -> tuple[Float, Float]:
        """Values of `[..., N]` with gate over up, within `error`, to `[..., I]` and its error."""
        limit = self.limit or np.inf
        if not self.gated:
            y, slope = self._activated(pre)
            return y, slope * error + RTOL * np.abs(y)
        gate, up = np.split(pre, 2, axis=-1)
        gate_error, up_error = np.split(error, 2, axis=-1)
        if self.limit_activated:
            y, slope = self._activated(gate)
            y = np.minimum(y, limit)
        else:
            y, slope = self._activated(np.minimum(gate, limit))
        up = np.clip(up, -limit, limit) + (self.activation == "clamped_swiglu")
        error = slope * gate_error * np.abs(up) + np.abs(y) * up_error
        return y * up, error + RTOL * (np.abs(y) * np.abs(up) + np.abs(up))


GATINGS = [
    *(Gating(activation, gated) for activation in ACTIVATIONS for gated in (False, True)),
    Gating("clamped_swiglu", alpha=1.702, limit=0.75),
    Gating("silu", limit=0.75),
    Gating("silu", limit=0.5, limit_activated=True),
]


@dataclass
class Experts:
    """Weights as checkpoints mostly have them: up `[E, N, H]`, gate over up, and down `[E, H, I]`.

    interleaved, transposed: how the operator gets them.
    """

    up: NDArray[np.float32]
    down: NDArray[np.float32]
    gating: Gating
    up_bias: NDArray[np.float32] | None = None
    down_bias: NDArray[np.float32] | None = None
    interleaved: bool = False
    transposed: bool = False

    def constants(self) -> dict[str, NDArray]:
        up, down, up_bias = self.up, self.down, self.up_bias
        if self.interleaved:
            up = _in_turns(up)
            up_bias = None if up_bias is None else _in_turns(up_bias)
        if self.transposed:
            up, down = (np.ascontiguousarray(part.swapaxes(1, 2)) for part in (up, down))
        arrays = {"up": up, "down": down, "up_bias": up_bias, "down_bias": self.down_bias}
        return {name: value for name, value in arrays.items() if value is not None}

    def attributes(self) -> dict[str, Any]:
        layout = {"interleaved": int(self.interleaved), "transposed": int(self.transposed)}
        return {**self.gating.attributes(), **layout}

    def session(self, isa: str = "", threads: int = 2) -> ort.InferenceSession:
        """It takes the inputs that `route` gives."""
        inputs = route(np.random.default_rng(0), 1, self.up.shape[2], len(self.up), 1)
        return moe_session("MoE", inputs, self.constants(), self.attributes(), isa, threads)

    def run(self, inputs: dict[str, NDArray], isa: str = "", threads: int = 2) -> NDArray:
        return self.session(isa, threads).run(None, inputs)[0]


def moe_session(
    op: str,
    inputs: dict[str, NDArray],
    constants: dict[str, NDArray],
    attributes: dict[str, Any],
    isa: str = "",
    threads: int = 2,
    order: Sequence[str] = INPUTS,
    optional: Sequence[str] = OPTIONAL,
) -> ort.InferenceSession:
    return one_node_session(op, inputs, constants, attributes, isa, threads, order, optional)


def _in_turns(array: NDArray) -> NDArray:
    gate, up = np.split(array, 2, axis=1)
    return np.stack([gate, up], axis=2).reshape(array.shape)


def random_experts(
    rng: np.random.Generator,
    experts: int,
    width: int,
    inner: int,
    gating: Gating | None = None,
    bias: bool = False,
    **layout: bool,
) -> Experts:
    """Experts whose channels have a standard deviation of about 1 for unit-variance inputs."""
    gating = gating or Gating()
    channels = inner * (2 if gating.gated else 1)

    def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return Experts(
        normal(experts, channels, width, scale=width**-0.5),
        normal(experts, width, inner, scale=inner**-0.5),
        gating,
        normal(experts, channels) if bias else None,
        normal(experts, width) if bias else None,
        **layout,
    )


def route(
    rng: np.random.Generator, tokens: int, width: int, experts: int, choices: int
) -> dict[str, NDArray]:
    """Inputs of `tokens` tokens, each with different experts as a router chooses them."""
    order = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    weights = rng.uniform(size=(tokens, choices)).astype(np.float32)
    return {
        "x": rng.normal(size=(tokens, width)).astype(np.float32),
        "top_k_index": np.ascontiguousarray(order[:, :choices]),
        "top_k_weights": weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9),
    }


def some_tokens(inputs: dict[str, NDArray], which: slice) -> dict[str, NDArray]:
    return {name: value[which] for name, value in inputs.items()}


def reference(experts: Experts, inputs: dict[str, NDArray]) -> tuple[Float, Float]:
    """Result `[tokens, H]` in float64 and the absolute tolerance for it."""
    x = inputs["x"].astype(np.float64)
    y, tolerance = np.zeros_like(x), np.zeros_like(x)
    for expert in range(len(experts.up)):
        tokens, choice = np.nonzero(inputs["top_k_index"] == expert)
        weight = inputs["top_k_weights"][tokens, choice].astype(np.float64)[:, None]
        zero = np.zeros(1)
        up_bias = zero if experts.up_bias is None else experts.up_bias[expert]
        down_bias = zero if experts.down_bias is None else experts.down_bias[expert]
        up, down = (part[expert].astype(np.float64).T for part in (experts.up, experts.down))
        magnitude = np.abs(x[tokens]) @ np.abs(up) + np.abs(up_bias)
        hidden, error = experts.gating.apply(x[tokens] @ up + up_bias, RTOL * magnitude)
        magnitude = np.abs(hidden) @ np.abs(down) + np.abs(down_bias)
        np.add.at(y, tokens, weight * (hidden @ down + down_bias))
        error = error @ np.abs(down) + RTOL * magnitude
        np.add.at(tolerance, tokens, np.abs(weight) * error)
    return y, tolerance


def assert_close(y: NDArray, expected: Float, tolerance: Float) -> None:
    assert y.shape == expected.shape
    excess = np.abs(y - expected) - tolerance
    assert not (excess > 0).any(), f"off by {np.abs(y - expected).max()}, {excess.max()} too much"


def assert_matches(experts: Experts, inputs: dict[str, NDArray], y: NDArray) -> None:
    assert_close(y, *reference(experts, inputs))
