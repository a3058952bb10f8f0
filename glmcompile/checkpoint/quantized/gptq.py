"""GPTQ: 2, 4 or 8 bits in groups of input channels, packed along them.

Layout: AutoGPTQ's and GPTQModel's linear layers. qweight int32 [in * bits / 32, out], qzeros int32
[groups, out * bits / 32], scales [groups, out], g_idx [in] (the group of each input channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from glmcompile.checkpoint.quantized.layers import ROWS, WORD, grouped, unpack, with_weights
from glmcompile.checkpoint.sources import Dequantized, Source
from glmcompile.errors import CheckpointError

# By checkpoint_format: what was subtracted from the zero points when they were packed.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def weights(stored: Mapping[str, Source], settings: Mapping[str, Any]) -> dict[str, Source]:
    """Stored tensors with each layer's replaced by its weight."""
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in ZERO_OFFSETS or settings.get("is_marlin_format"):
        raise CheckpointError(
            f"the checkpoint is packed as {form} of GPTQ; {' and '.join(ZERO_OFFSETS)} are read. "
            "Give the original checkpoint, or one packed so"
        )
    weight = partial(_weight, zero_offset=ZERO_OFFSETS[form])
    return with_weights(stored, weight, optional=("g_idx",))


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """(q - z) * s of each group, float32 [out, in].

    Without g_idx groups follow one another.
    """
    rows = len(qweight) * WORD // bits
    zeros = (unpack(qzeros, bits, 1) + zero_offset) & ((1 << bits) - 1)
    if g_idx is None:
        g_idx = torch.arange(rows) // (rows // len(scales))
    blocks = (unpack(packed, bits, 0) for packed in qweight.split(ROWS))
    return grouped(blocks, zeros, scales.float(), g_idx.long())


def _weight(parts: Mapping[str, Source], zero_offset: int) -> Dequantized:
    qweight, qzeros, scales = (parts[name].shape for name in ("qweight", "qzeros", "scales"))
    groups, out = scales
    bits = WORD * qzeros[1] // out
    if bits not in (2, 4, 8) or qzeros != (groups, out * bits // WORD) or qweight[1] != out:
        raise CheckpointError(
            f"{parts['qweight']} {list(qweight)} with qzeros {list(qzeros)} and scales "
            f"{list(scales)}: 2, 4 or 8 bits were expected, in int32 [in * bits / 32, out] and "
            "[groups, out * bits / 32]. Give the original checkpoint"
        )
    unpacked = partial(dequantize, bits=bits, zero_offset=zero_offset)
    return Dequantized(parts, unpacked, (out, qweight[0] * WORD // bits))
