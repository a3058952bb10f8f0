"""Fine-grained FP8, as DeepSeek and Qwen publish it: float8 weights, one scale for each block.

Layout: transformers' integrations/finegrained_fp8.py. `weight_scale_inv` is what a block is
multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from glmcompile.checkpoint.quantized.layers import FLOAT8, blocks_fit, over
from glmcompile.checkpoint.sources import Dequantized, Source
from glmcompile.errors import CheckpointError

SCALE = "_scale_inv"


def weights(stored: Mapping[str, Source], settings: Mapping[str, Any]) -> dict[str, Source]:
    """Stored tensors with each float8 weight replaced by its values."""
    block = tuple(settings.get("weight_block_size") or ())
    result = dict(stored)
    for key, weight in stored.items():
        scale = stored.get(key + SCALE)
        if scale is None:
            continue
        if weight.dtype not in FLOAT8:
            raise CheckpointError(
                f"{weight} is {str(weight.dtype).removeprefix('torch.')}; a weight with "
                f"{SCALE.removeprefix('_')} was expected in float8. Give the original checkpoint"
            )
        sizes = [None] * (len(weight.shape) - 2) + list(block)
        if scale.shape and len(scale.shape) == len(weight.shape) == len(sizes):
            fits = all(map(blocks_fit, scale.shape, weight.shape, sizes))
        else:
            fits = len(scale.shape) <= 1 or not block
        if not fits:
            raise CheckpointError(
                f"{weight} {list(weight.shape)} has scales {list(scale.shape)}, which are no "
                f"blocks of {list(block)}; fetch the checkpoint again"
            )
        del result[key + SCALE]
        parts = {"weight": weight, "scale": scale}
        result[key] = Dequantized(parts, partial(dequantize, block=block), weight.shape)
    return result


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] = ()
) -> torch.Tensor:
    """weight * scale of each block, float32."""
    if scale.dtype == torch.uint8:  # the exponents of powers of two
        scale = torch.exp2(scale.float() - 127)
    return weight.float().mul_(over(scale.float(), weight.shape, block))
