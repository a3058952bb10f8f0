"""The KV pools' memory: one key and one value pool per decoder layer, in page-aligned memory."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glmcompile.config import ModelConfig


@dataclass(frozen=True)
class KVCacheShape:
    """Geometry of the pools.

    Each pool is [num_blocks, block_size, num_kv_heads, head_size] of dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, model: ModelConfig, block_size: int, dtype: DTypeLike) -> KVCacheShape:
        return cls(
            model.num_layers, model.num_kv_heads, model.head_size, block_size, np.dtype(dtype)
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        rows = 2 * self.num_layers * self.block_size * self.num_kv_heads
        return rows * self.head_size * self.dtype.itemsize

    def pool(self, num_blocks: int) -> NDArray[Any]:
        """One zeroed pool. Pages take memory when they are first written."""
        shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        size = int(np.prod(shape)) * self.dtype.itemsize
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, self.dtype).reshape(shape)
