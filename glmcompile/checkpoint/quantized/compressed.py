"""compressed-tensors, as llm-compressor writes: packed integers, int8 and float8, with scales.

Layout: compressed_tensors/compressors. `weight_packed` int32 [out, in * bits / 32] with the shape
beside it, or `weight` in int8 or float8; `weight_scale` for the tensor, each row, each group of
columns or each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from glmcompile.checkpoint.quantized.layers import FLOAT8, WORD, blocks_fit, over, parts_of, unpack
from glmcompile.checkpoint.sources import Dequantized, Source, WeightFiles
from glmcompile.errors import CheckpointError

FORMS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "dense",
)  # fmt: skip
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def weights(stored: Mapping[str, Source], settings: Mapping[str, Any]) -> dict[str, Source]:
    """Stored tensors with each layer's replaced by its weight."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if group]
    _check(settings, groups)
    schemes = [group["weights"] for group in groups if group.get("weights")]
    result = dict(stored)
    for key in stored:
        if not key.endswith(".weight_scale"):
            continue
        prefix = key.removesuffix("weight_scale")
        weight = _packed if f"{prefix}weight_packed" in stored else _plain
        made = weight(stored, prefix, schemes)
        for part in PARTS:
            result.pop(prefix + part, None)
        result[f"{prefix}weight"] = made
    return result


def dequantize(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    *,
    block: tuple[int | None, ...] = (),
) -> torch.Tensor:
    """(q - z) * s, float32, of values that are stored as they are."""
    values = weight.float()
    for part, apply in ((weight_zero_point, values.sub_), (weight_scale, values.mul_)):
        if part is None:
            continue
        part = part.float()
        if weight_g_idx is not None:
            apply(part[:, weight_g_idx.long()])
        else:
            apply(over(part, values.shape, block))
    return values


def dequantize_packed(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    *,
    bits: int,
    shape: tuple[int, ...],
    block: tuple[int | None, ...] = (),
) -> torch.Tensor:
    """(q - z) * s, float32, of integers that were shifted to be unsigned and packed.

    Zero points are packed along the rows; those for a whole tensor are stored as they are.
    """
    middle = 1 << (bits - 1)
    values = unpack(weight_packed, bits, -1)[..., : shape[-1]] - middle
    zeros = weight_zero_point
    if zeros is not None and zeros.dtype == torch.int32 and zeros.numel() != 1:
        zeros = unpack(zeros, bits, -2)[..., : shape[-2], :] - middle
    return dequantize(values, weight_scale, zeros, weight_g_idx, block=block)


def _packed(stored: Mapping[str, Source], prefix: str, schemes: list[Any]) -> Dequantized:
    parts = parts_of(
        stored,
        prefix,
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
    )
    packed = parts["weight_packed"]
    shape = tuple(parts.pop("weight_shape").read(WeightFiles()).tolist())
    columns = packed.shape[-1]
    bits = next(
        (
            bits
            for bits in _of(schemes, "num_bits")
            if WORD % bits == 0 and columns == -(-shape[-1] * bits // WORD)
        ),
        None,
    )
    if packed.dtype != torch.int32 or bits is None or packed.shape[:-1] != shape[:-1]:
        raise CheckpointError(
            f"{packed} {list(packed.shape)} in {str(packed.dtype).removeprefix('torch.')}: for a "
            f"weight of {list(shape)}, int32 {[*shape[:-1], '...']} with integers of 2, 4 or 8 "
            "bits was expected, as config_groups says. Give the original checkpoint"
        )
    block = _block(parts["weight_scale"], shape, schemes)
    unpacked = partial(dequantize_packed, bits=bits, shape=shape, block=block)
    return Dequantized(parts, unpacked, shape)


def _plain(stored: Mapping[str, Source], prefix: str, schemes: list[Any]) -> Dequantized:
    parts = parts_of(
        stored, prefix, ("weight", "weight_scale"), ("weight_zero_point", "weight_g_idx")
    )
    weight = parts["weight"]
    if weight.dtype not in (torch.int8, *FLOAT8):
        raise CheckpointError(
            f"{weight} is {str(weight.dtype).removeprefix('torch.')}; a weight with a scale was "
            "expected in int8 or float8. Give the original checkpoint"
        )
    block = _block(parts["weight_scale"], weight.shape, schemes)
    return Dequantized(parts, partial(dequantize, block=block), weight.shape)


def _block(scale: Source, shape: tuple[int, ...], schemes: list[Any]) -> tuple[int | None, ...]:
    """Rows and columns that one scale is for; None where scales divide the axis."""
    count = scale.shape
    if len(count) < 2:
        if scale.shape in ((), (1,), (shape[0],)):
            return ()
    else:
        groups = [(None, size) for size in _of(schemes, "group_size") if size > 0]
        blocks = [tuple(size) for size in _of(schemes, "block_structure")]
        for rows, columns in (*blocks, *groups, (None, None)):
            if blocks_fit(count[-2], shape[-2], rows) and blocks_fit(count[-1], shape[-1], columns):
                return (rows, columns)
    raise CheckpointError(
        f"{scale} {list(count)} are no scales for a weight of {list(shape)}, by rows, groups or "
        "blocks as config_groups says; fetch the checkpoint again"
    )


def _of(schemes: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(each for scheme in schemes if (each := _hashable(scheme, name))))


def _hashable(scheme: Mapping[str, Any], name: str) -> Any:
    value = scheme.get(name)
    return tuple(value) if isinstance(value, list) else value


def _check(settings: Mapping[str, Any], groups: list[Any]) -> None:
    """Raises CheckpointError for forms that are not read."""
    forms = {settings.get("format"), *(group.get("format") for group in groups)} - {None}
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    unread = sorted(form for form in forms if form not in FORMS)
    if sparsity != "dense":
        unread.append(sparsity)
    if (settings.get("transform_config") or {}).get("config_groups"):
        unread.append("rotated weights (transform_config)")
    if unread:
        raise CheckpointError(
            f"the checkpoint's compressed-tensors are {', '.join(unread)}; {', '.join(FORMS)} are "
            "read. Give the original checkpoint"
        )
