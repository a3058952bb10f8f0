"""The functions that transformers' recurrent layers call while a model is probed or traced.

A layer's state is a pool with a slot for each sequence, which the operator reads and updates; the
functions themselves know one sequence a row of the batch and start from zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glmcompile.export.attention import StateCall, current_tracing
from glmcompile.export.replacements import replaced

_NORM_EPSILON = 1e-6  # of the models' l2norm in the delta rule


def _operator(
    name: str, state: tuple[int, ...], inputs: list[Any], attributes: dict[str, Any], width: int
) -> torch.Tensor:
    """A recurrent operator over packed tokens [tokens, ...]; returns [tokens, width].

    state: shape of one sequence's state.
    """
    tracing = current_tracing()
    index = len(tracing.states)
    tracing.states.append(StateCall(name, state, tracing.layer()))
    first = inputs[0]
    pools = (tracing.state_pools[index],) if tracing.state_pools else ()
    return torch.onnx.ops.symbolic(
        f"com.glmcompile::{name}",
        [*inputs, *pools, *tracing.state_batch],
        attributes,
        dtype=first.dtype,
        shape=(first.shape[0], width),
        version=1,
    )


def _packed(value: torch.Tensor) -> torch.Tensor:
    """[1, tokens, ...] as [tokens, channels]."""
    return value.reshape(value.shape[1], -1)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor:
    """causal_conv1d_fn of x [1, channels, tokens] and weight [channels, kernel]."""
    channels, kernel = weight.shape
    output = _operator(
        "PackedCausalConv",
        (channels, kernel - 1),
        [x.squeeze(0).transpose(0, 1), weight, bias],
        {"activation": activation or ""},
        channels,
    )
    return output.transpose(0, 1).unsqueeze(0)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """chunk_gated_delta_rule and Kimi's delta attention, of [1, tokens, heads, channels]."""
    k_heads, k_size = key.shape[2:]
    v_heads, v_size = value.shape[2:]
    output = _operator(
        "PackedGatedDeltaRule",
        (v_heads, k_size, v_size),
        [_packed(each) for each in (query, key, value, g, beta)],
        {
            "k_heads": k_heads,
            "v_heads": v_heads,
            "l2norm_epsilon": _NORM_EPSILON if use_qk_l2norm_in_kernel else 0.0,
        },
        v_heads * v_size,
    )
    return output.view(1, -1, v_heads, v_size), None


def mamba2_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> torch.Tensor:
    """mamba2_chunk_scan of x [1, tokens, heads, head_size] and B, C [1, tokens, groups, states]."""
    heads, head_size = x.shape[2:]
    output = _operator(
        "PackedMamba2",
        (heads, head_size, B.shape[-1]),
        [_packed(x), _packed(dt), A, _packed(B), _packed(C), D, dt_bias],
        {
            "dt_softplus": int(dt_softplus),
            "time_step_min": float(dt_limit[0]),
            "time_step_max": float(dt_limit[1]),
        },
        heads * head_size,
    )
    return output.view(1, -1, heads, head_size)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
}


@contextmanager
def recurrent_layers() -> Iterator[None]:
    """Let recurrent layers call the functions here."""
    with replaced(_FUNCTIONS):
        yield
