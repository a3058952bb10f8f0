"""Random batches for PagedAttention: block tables, ragged lengths, caches with a past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.native.attention_reference import Array


@dataclass(frozen=True)
class Shape:
    num_heads: int = 6
    kv_num_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    value_head_size: int | None = None  # head_size where it is not given

    @property
    def v_head_size(self) -> int:
        return self.head_size if self.value_head_size is None else self.value_head_size

    @property
    def attributes(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "kv_num_heads": self.kv_num_heads}


def random_batch(
    shape: Shape,
    past: Sequence[int],
    new: Sequence[int],
    seed: int = 0,
    packed: bool = False,
    spare_blocks: int = 5,
) -> dict[str, Array]:
    """Inputs of one call: sequence i has past[i] cached and new[i] packed tokens.

    Blocks are dealt at random. Slots that no sequence owns hold NaN, as uninitialised memory may.
    """
    rng = np.random.default_rng(seed)
    totals = np.add(past, new)
    needed = -(-totals // shape.block_size)
    blocks = rng.permutation(int(needed.sum()) + spare_blocks).astype(np.int32)
    table = np.full((len(past), int(max(needed, default=0)) + 1), -1, np.int32)
    cache_shape = (len(blocks), shape.block_size, shape.kv_num_heads)
    key_cache = np.full((*cache_shape, shape.head_size), np.nan, np.float32)
    value_cache = np.full((*cache_shape, shape.v_head_size), np.nan, np.float32)
    for i, count in enumerate(needed):
        table[i, :count], blocks = blocks[:count], blocks[count:]
        at = np.arange(past[i])
        where = table[i, at // shape.block_size], at % shape.block_size
        key_cache[where] = rng.standard_normal((past[i], *key_cache.shape[2:]))
        value_cache[where] = rng.standard_normal((past[i], *value_cache.shape[2:]))
    widths = (
        shape.num_heads * shape.head_size,
        shape.kv_num_heads * shape.head_size,
        shape.kv_num_heads * shape.v_head_size,
    )
    query, key, value = (rng.standard_normal((sum(new), n)).astype(np.float32) for n in widths)
    feed = {"query": np.concatenate([query, key, value], axis=1)} if packed else {
        "query": query, "key": key, "value": value,
    }  # fmt: skip
    return {
        **feed,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cumulative_sequence_length": np.cumsum([0, *new], dtype=np.int32),
        "past_seqlens": np.array(past, np.int32),
        "block_table": table,
    }


def image_spans(feed: dict[str, Array], lengths: Sequence[int] = (3, 1, 40, 7, 150)) -> Array:
    """attend_span of new tokens that are text and images by turns, of these lengths, repeated.

    Ends at the boundaries of sequences; the last run of a sequence may be cut short.
    """
    spans = []
    ends = feed["cumulative_sequence_length"]
    for i, past in enumerate(feed["past_seqlens"]):
        position, end, run = int(past), int(past + ends[i + 1] - ends[i]), 0
        while position < end:
            size = min(lengths[run % len(lengths)], end - position)
            if run % 2 == 0:
                spans += [(p, p) for p in range(position, position + size)]
            else:
                spans += [(position, position + size)] * size
            position, run = position + size, run + 1
    return np.array(spans, np.int32).reshape(-1, 2)


def quantized(feed: dict[str, Array], per_channel: bool, seed: int = 1) -> dict[str, Array]:
    """The same batch with int8 caches and scales that clip a few of the new values."""
    rng = np.random.default_rng(seed)
    out = dict(feed)
    for cache, scale in (("key_cache", "k_scale"), ("value_cache", "v_scale")):
        _, _, heads, size = feed[cache].shape
        shape = (heads, 1, size) if per_channel else (1,)
        out[scale] = rng.uniform(0.015, 0.03, shape).astype(np.float32)
        old = np.nan_to_num(feed[cache]) / out[scale].reshape(-1, out[scale].shape[-1])
        out[cache] = np.clip(np.rint(old), -128, 127).astype(np.int8)
    return out


def quantized_attributes(per_channel: bool) -> dict[str, str]:
    kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
    return {"k_quant_type": kind, "v_quant_type": kind}
