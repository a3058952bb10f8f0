"""The attention functions that transformers modules call while traced: one symbolic node each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

PAGED_ATTENTION = "glmcompile_paged"
# transformers passes cu_seqlens to the attention function only under a name containing "flash";
# otherwise it splits the patches by image, which a graph with dynamic sizes cannot hold.
VARLEN_ATTENTION = "glmcompile_flash_varlen"


@dataclass(frozen=True)
class PagedCache:
    """The decoder's cache inputs, handed through the modules to every attention layer.

    key_caches, value_caches: [num_blocks, block_size, kv_heads, head_size], one pair per layer.
    """

    key_caches: tuple[torch.Tensor, ...]
    value_caches: tuple[torch.Tensor, ...]
    cumulative_sequence_length: torch.Tensor
    past_seqlens: torch.Tensor
    block_table: torch.Tensor


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    paged_cache: PagedCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """com.microsoft::PagedAttention over the layer's cache.

    query, key, value: [1, heads, tokens, head_size], packed; output [1, tokens, heads, head_size].
    """
    assert paged_cache is not None
    _, heads, tokens, head_size = query.shape
    kv_heads = key.shape[1]
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = torch.onnx.ops.symbolic(
        "com.microsoft::PagedAttention",
        (
            query.transpose(1, 2).reshape(tokens, heads * head_size),
            key.transpose(1, 2).reshape(tokens, kv_heads * head_size),
            value.transpose(1, 2).reshape(tokens, kv_heads * head_size),
            paged_cache.key_caches[layer],
            paged_cache.value_caches[layer],
            paged_cache.cumulative_sequence_length,
            paged_cache.past_seqlens,
            paged_cache.block_table,
        ),
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": float(scaling if scaling is not None else head_size**-0.5),
        },
        dtype=query.dtype,
        shape=(tokens, heads * head_size),
        version=1,
    )
    return output.view(1, tokens, heads, head_size), None


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """com.glmcompile::VarlenAttention: non-causal inside each segment of cu_seq_lens_q."""
    assert cu_seq_lens_q is not None
    _, heads, tokens, head_size = query.shape
    packed = [
        # The modules unsqueeze and transpose each of these; undone in the same order, both cancel.
        tensor.squeeze(0).transpose(0, 1).reshape(tokens, tensor.shape[1] * head_size)
        for tensor in (query, key, value)
    ]
    output = torch.onnx.ops.symbolic(
        "com.glmcompile::VarlenAttention",
        (*packed, cu_seq_lens_q),
        {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": float(scaling if scaling is not None else head_size**-0.5),
        },
        dtype=query.dtype,
        shape=(tokens, heads * head_size),
        version=1,
    )
    return output.view(1, tokens, heads, head_size), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and sequence boundaries are the attention operator's business."""


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
AttentionMaskInterface.register(PAGED_ATTENTION, _no_mask)
AttentionMaskInterface.register(VARLEN_ATTENTION, _no_mask)
