"""AWQ: 4 bits in groups of input channels, packed along the output channels, interleaved.

Layout: AutoAWQ's WQLinear_GEMM. qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales
[groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glmcompile.checkpoint.quantized.layers import ROWS, WORD, grouped, unpack, with_weights
from glmcompile.checkpoint.sources import Dequantized, Source
from glmcompile.errors import CheckpointError

BITS = 4
FORMS = ("gemm", "exllama", "ipex")  # kernels that read the same layout
# The place in a word of each of its eight channels; the channels of each place: 0 2 4 6 1 3 5 7.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def weights(stored: Mapping[str, Source], settings: Mapping[str, Any]) -> dict[str, Source]:
    """Stored tensors with each layer's replaced by its weight."""
    form = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if form not in FORMS or bits != BITS:
        raise CheckpointError(
            f"the checkpoint is packed as {form} of AWQ in {bits} bits; 4 bits as gemm are read. "
            "Give the original checkpoint"
        )
    return with_weights(stored, _weight)


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(q - z) * s of each group, float32 [out, in]."""
    groups = torch.arange(len(qweight)) // (len(qweight) // len(scales))
    blocks = map(_unpack, qweight.split(ROWS))
    return grouped(blocks, _unpack(qzeros), scales.float(), groups)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    values = unpack(packed, BITS, 1)
    words = values.view(len(values), -1, WORD // BITS)
    return words[..., list(PLACES)].flatten(1)


def _weight(parts: Mapping[str, Source]) -> Dequantized:
    qweight, qzeros, scales = (parts[name].shape for name in ("qweight", "qzeros", "scales"))
    rows, packed = qweight
    groups, out = scales
    if qzeros != (groups, packed) or out != packed * WORD // BITS or rows % groups:
        raise CheckpointError(
            f"{parts['qweight']} {list(qweight)} with qzeros {list(qzeros)} and scales "
            f"{list(scales)}: int32 [in, out / 8] and [groups, out / 8] were expected; fetch the "
            "checkpoint again"
        )
    return Dequantized(parts, dequantize, (out, rows))
