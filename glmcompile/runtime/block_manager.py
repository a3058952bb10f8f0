"""The pool of KV-cache blocks: who uses which, and which can be reused for a shared prefix.

Prefix reuse follows vLLM's automatic prefix caching: a full block is known by a hash over its
tokens and everything before them. Two images share placeholder tokens, so the images' digests are
part of the key.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from glmcompile.runtime.sequence import Sequence


class BlockManager:
    """Hands out block numbers; never touches the cache's memory.

    A block is free (nobody's, nothing known of it), in use (ref count > 0) or cached: free to be
    taken, but its contents still serve a sequence with the same prefix. Cached blocks are taken
    last, the least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int = 32, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, sequence: Sequence, reserve: int = 0) -> bool:
        """Whether all present tokens fit while leaving `reserve` blocks free."""
        reused = self._reusable(sequence)
        taken = self.blocks_for(len(sequence)) - len(reused)
        taken += sum(self._ref_counts[block] == 0 for block in reused)
        return taken + reserve <= self.num_free_blocks

    def allocate(self, sequence: Sequence) -> None:
        """Fill the block table for all present tokens; num_computed_tokens is what was reused."""
        reused = self._reusable(sequence)
        for block in reused:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
        needed = self.blocks_for(len(sequence)) - len(reused)
        sequence.block_table = reused + [self._take() for _ in range(needed)]
        sequence.num_committed_blocks = len(reused)
        sequence.num_computed_tokens = len(reused) * self.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens

    def can_append(self, sequence: Sequence) -> bool:
        """Whether tokens added since the last allocate or append fit."""
        missing = self.blocks_for(len(sequence)) - len(sequence.block_table)
        return missing <= self.num_free_blocks

    def append(self, sequence: Sequence) -> None:
        """Extend the block table to all present tokens."""
        while len(sequence.block_table) < self.blocks_for(len(sequence)):
            sequence.block_table.append(self._take())

    def commit(self, sequence: Sequence) -> None:
        """Offer the blocks that num_computed_tokens has filled for reuse."""
        if not self._prefix_caching:
            return
        full = sequence.num_computed_tokens // self.block_size
        for index in range(sequence.num_committed_blocks, full):
            key = self._key(sequence, index)
            # Two sequences may fill equal blocks at the same time; the first one's is kept.
            if key not in self._by_hash:
                block = sequence.block_table[index]
                self._hashes[block] = key
                self._by_hash[key] = block
        sequence.num_committed_blocks = max(full, sequence.num_committed_blocks)

    def free(self, sequence: Sequence) -> None:
        """Give back the sequence's blocks; those committed stay reusable until they are needed."""
        # From the end, so that of one prefix the longer part is taken first.
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        sequence.block_table = []
        sequence.num_committed_blocks = 0
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every block is free, cached or owned, once; `sequences` are all that own any.

        Raises AssertionError naming a block for which that does not hold.
        """
        owners = Counter(block for sequence in sequences for block in sequence.block_table)
        free = Counter(self._free)
        for block, references in enumerate(self._ref_counts):
            places = free[block] + (block in self._cached) + (references > 0)
            assert places == 1, f"block {block} is in {places} of free, cached and owned"
            assert references == owners[block], (
                f"block {block} has {owners[block]} owners and {references} references"
            )
            known = self._hashes[block]
            assert known is None or self._by_hash[known] == block, f"block {block} is misfiled"
            assert known is not None or block not in self._cached, f"block {block} has no key"

    def reset_cache(self) -> None:
        """Forget all cached contents; blocks in use stay with their sequences."""
        for block in self._by_hash.values():
            self._hashes[block] = None
        self._by_hash.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._hashes[block]
            assert key is not None
            del self._by_hash[key]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def _reusable(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's beginning; at least its last token is left to compute."""
        blocks: list[int] = []
        if not self._prefix_caching:
            return blocks
        for index in range((len(sequence) - 1) // self.block_size):
            block = self._by_hash.get(self._key(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """SHA-256 over the block's tokens, the images it overlaps and the previous block's key."""
        keys = sequence.block_hashes
        while len(keys) <= index:
            start = len(keys) * self.block_size
            stop = start + self.block_size
            digest = hashlib.sha256(keys[-1] if keys else b"")
            digest.update(np.array(sequence.token_ids[start:stop], np.int64).tobytes())
            for span in sequence.images:
                if span.start < stop and span.end > start:
                    digest.update(span.image.digest)
                    digest.update((span.start - start).to_bytes(8, "little", signed=True))
            keys.append(digest.digest())
        return keys[index]
