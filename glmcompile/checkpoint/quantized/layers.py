"""What the formats share: the tensors of a layer, packed integers, scales over blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from glmcompile.checkpoint.sources import Source
from glmcompile.errors import CheckpointError

WORD = 32  # bits that integers are packed into
ROWS = 512  # of a packed matrix that are unpacked at a time
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def parts_of(
    stored: Mapping[str, Source], prefix: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Source]:
    """A layer's tensors by the last part of their names. Raises CheckpointError for one missing."""
    found = {name: stored[key] for name in (*needed, *optional) if (key := prefix + name) in stored}
    for name in needed:
        if name not in found:
            raise CheckpointError(
                f"{next(iter(found.values()), prefix)}: the checkpoint lacks {prefix}{name}, "
                "without which the layer's weight cannot be computed; fetch it again"
            )
    return found


def with_weights(
    stored: Mapping[str, Source],
    weight: Callable[[Mapping[str, Source]], Source],
    optional: Sequence[str] = (),
) -> dict[str, Source]:
    """Stored tensors with those of each packed layer (qweight, qzeros, scales) replaced by its
    weight. optional: further tensors that a layer may have."""
    result = dict(stored)
    for key in stored:
        if not key.endswith(".qweight"):
            continue
        prefix = key.removesuffix("qweight")
        parts = parts_of(stored, prefix, ("qweight", "qzeros", "scales"), optional)
        for name in parts:
            del result[prefix + name]
        result[f"{prefix}weight"] = weight(parts)
    return result


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned values of `bits` bits, the lowest bits of each word first, along a dimension.

    packed: int32; bits: a divisor of 32. int32, 32 / bits times as long along `dim`.
    """
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    dim %= packed.ndim
    shape = [1] * (packed.ndim + 1)
    shape[dim + 1] = len(shifts)
    values = (packed.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return values.flatten(dim, dim + 1)


def grouped(
    blocks: Iterable[torch.Tensor], zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """(q - z) * s, float32 [out, in], of integers that come in blocks of input channels.

    blocks: int32 [channels, out]. zeros, scales: [groups, out]. groups: int64 [in], the group of
    each input channel.
    """
    result = torch.empty(scales.shape[1], len(groups))
    start = 0
    for values in blocks:
        of = groups[start : start + len(values)]
        result[:, start : start + len(values)] = ((values - zeros[of]) * scales[of]).T
        start += len(values)
    return result


def over(
    scale: torch.Tensor, shape: Sequence[int], block: Sequence[int | None] = ()
) -> torch.Tensor:
    """Scales repeated over the blocks of a weight, so that they can be multiplied with it.

    block: sizes of the blocks along the last axes; None, or none, where they divide the axis.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:  # one for each row
        scale = scale[:, None]
    sizes = [*[None] * (len(shape) - len(block)), *block]
    for dim, (length, size) in enumerate(zip(shape, sizes, strict=True)):
        count = scale.shape[dim]
        if count not in (1, length):
            step = size or length // count
            scale = scale.repeat_interleave(step, dim).narrow(dim, 0, length)
    return scale


def blocks_fit(count: int, length: int, size: int | None) -> bool:
    """Whether `count` scales cover an axis."""
    if count in (1, length):
        return True
    return length % count == 0 if size is None else count == math.ceil(length / size)
