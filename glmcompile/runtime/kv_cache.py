"""The KV pools' memory: a key and a value pool for each decoder layer, in page-aligned memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glmcompile.contract import KEY_CACHE, VALUE_CACHE, Contract


class KVCacheShape:
    """Geometry of the pools: each is [num_blocks, block_size, kv_heads, head_size] of dtype, with
    its layer's own heads."""

    def __init__(self, model: Contract, block_size: int, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._blocks: dict[str, tuple[int, ...]] = {
            port.name: (block_size, *(int(size) for size in port.shape[2:]))
            for role in (KEY_CACHE, VALUE_CACHE)
            for port in model.decoder.having(role)
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return sum(int(np.prod(shape)) for shape in self._blocks.values()) * self.dtype.itemsize

    def pools(self, num_blocks: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """Zeroed pools by the names of their ports. Pages take memory when they are first
        written."""
        for name, block in self._blocks.items():
            shape = (num_blocks, *block)
            memory = mmap.mmap(-1, max(1, int(np.prod(shape)) * self.dtype.itemsize))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            count = int(np.prod(shape))
            yield name, np.frombuffer(memory, self.dtype, count).reshape(shape)
