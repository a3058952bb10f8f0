"""The experts function that transformers' mixture-of-experts modules call while traced: one node.

Routing stays in the graph. What happens between an expert's two layers is found by trying: the
module's own function on drawn numbers against what the operator can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from glmcompile.errors import UnsupportedArchitectureError

EXPERTS = "glmcompile_experts"

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")


def symbolic_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """com.glmcompile::MoE for hidden_states [tokens, hidden]."""
    if module.has_post_expert_norm:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} normalizes each expert's output, which no operator does"
        )
    up = module.gate_up_proj if module.has_gate else module.up_proj
    weights = [up, module.down_proj]
    if module.has_bias:
        bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        weights += [bias, module.down_proj_bias]
    return torch.onnx.ops.symbolic(
        "com.glmcompile::MoE",
        (hidden_states, top_k_index, top_k_weights, *weights),
        {
            "gated": int(module.has_gate),
            "transposed": int(module.is_transposed),
            **_activation(module),
        },
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )


def _activation(module: Any) -> dict[str, Any]:
    """The operator's attributes that give what the module computes between its layers."""
    with _disable_current_modes():  # numbers are computed here, whatever is being traced
        generator = torch.Generator().manual_seed(0)
        drawn = 4 * torch.randn(64, 32, generator=generator)
        expected = module._apply_gate(drawn) if module.has_gate else module.act_fn(drawn)
        for attributes, actual in _candidates(module, drawn):
            if torch.allclose(expected, actual, rtol=1e-5, atol=1e-5):
                return attributes
    raise UnsupportedArchitectureError(
        f"{type(module).__name__} computes something between an expert's layers that no operator "
        "does"
    )


def _candidates(module: Any, drawn: torch.Tensor) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    if not module.has_gate:
        for name, activation in _ACTIVATIONS.items():
            yield {"activation": name}, activation(drawn)
        return
    limit, alpha = (_setting(module, names) for names in (_LIMITS, _ALPHAS))
    layouts = {0: drawn.chunk(2, dim=-1), 1: (drawn[..., ::2], drawn[..., 1::2])}
    for interleaved, (gate, up) in layouts.items():
        order = {"interleaved": interleaved}
        for name, activation in _ACTIVATIONS.items():
            yield {"activation": name, **order}, activation(gate) * up
            if limit is None:
                continue
            bounded = up.clamp(-limit, limit)
            limited = {"activation": name, "limit": limit, **order}
            yield limited, activation(gate.clamp(max=limit)) * bounded
            yield limited | {"limit_activated": 1}, activation(gate).clamp(max=limit) * bounded
        if limit is not None and alpha is not None:
            below = gate.clamp(max=limit)
            glu = below * torch.sigmoid(alpha * below) * (up.clamp(-limit, limit) + 1)
            yield {"activation": "clamped_swiglu", "limit": limit, "alpha": alpha, **order}, glu


def _setting(module: nn.Module, names: tuple[str, ...]) -> float | None:
    found = (getattr(module, name, None) for name in names)
    return next((float(value) for value in found if isinstance(value, int | float)), None)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, symbolic_experts)
