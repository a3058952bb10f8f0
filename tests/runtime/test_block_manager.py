"""Cache blocks: no leaks, exact sharing, nothing shared between different images."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.sequence import Sequence
from tests.runtime.sequences import image_span, sequence

NUM_BLOCKS, BLOCK_SIZE = 9, 4


def run_once(blocks: BlockManager, item: Sequence) -> int:
    """Compute a sequence and give its blocks back; returns how many tokens were reused."""
    blocks.allocate(item)
    reused = item.num_computed_tokens
    item.num_computed_tokens = len(item)
    blocks.commit(item)
    blocks.free(item)
    return reused


class BlockPool(RuleBasedStateMachine):
    """Sequences of few distinct tokens and images come, grow, are computed and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple] = {}  # block -> what was computed into it

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        picture=st.sampled_from([b"a", b"b", None]),
        place=st.integers(0, 6),
    )
    def allocate(self, tokens: list[int], picture: bytes | None, place: int) -> None:
        spans = []
        if picture is not None:
            tokens[place : place + 3] = [7, 7, 7]
            spans = [image_span(min(place, len(tokens) - 3), 3, picture)]
        item = sequence(tokens, images=spans)
        fits = self.blocks.can_allocate(item)
        if fits:
            self.blocks.allocate(item)
            self.live.append(item)
            for index in range(item.num_computed_tokens // BLOCK_SIZE):
                assert self.contents[item.block_table[index]] == self.expected(item, index)
            assert item.num_computed_tokens < len(item)
        else:
            assert self.blocks.blocks_for(len(item)) > self.blocks.num_free_blocks or self.live

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def append(self, which: int, token: int) -> None:
        item = self.live[which % len(self.live)]
        item.token_ids.append(token)
        if self.blocks.can_append(item):
            self.blocks.append(item)
        else:
            item.token_ids.pop()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), count=st.integers(1, 9))
    def compute(self, which: int, count: int) -> None:
        item = self.live[which % len(self.live)]
        start = item.num_computed_tokens
        item.num_computed_tokens = min(len(item), start + count)
        for index in range(start // BLOCK_SIZE, self.blocks.blocks_for(item.num_computed_tokens)):
            self.contents[item.block_table[index]] = self.expected(item, index)
        self.blocks.commit(item)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        self.blocks.free(self.live.pop(which % len(self.live)))

    @rule()
    def reset(self) -> None:
        self.blocks.reset_cache()

    def expected(self, item: Sequence, index: int) -> tuple:
        """Everything a full block's keys and values depend on."""
        stop = (index + 1) * BLOCK_SIZE
        seen = tuple((s.start, s.image.digest) for s in item.images if s.start < stop)
        return tuple(item.token_ids[:stop]), seen

    @invariant()
    def every_block_is_free_or_counted(self) -> None:
        used = Counter(block for item in self.live for block in item.block_table)
        assert self.blocks.num_free_blocks == NUM_BLOCKS - len(used)
        assert self.blocks._ref_counts == [used[block] for block in range(NUM_BLOCKS)]
        free = [*self.blocks._free, *self.blocks._cached]
        assert sorted([*free, *used]) == list(range(NUM_BLOCKS))

    @invariant()
    def tokens_still_to_be_written_lie_in_blocks_of_their_own(self) -> None:
        used = Counter(block for item in self.live for block in item.block_table)
        for item in self.live:
            for block in item.block_table[item.num_computed_tokens // BLOCK_SIZE :]:
                assert used[block] == 1


TestBlockPool = BlockPool.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_full_blocks_of_a_shared_prefix_are_reused() -> None:
    blocks = BlockManager(8, 4)
    run_once(blocks, sequence(range(10)))
    assert run_once(blocks, sequence([*range(9), 99, 98])) == 8
    assert run_once(blocks, sequence([*range(5), 99, 98, 97])) == 4
    assert run_once(blocks, sequence([99, *range(10)])) == 0


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, 4)
    run_once(blocks, sequence(range(8)))
    assert run_once(blocks, sequence(range(8))) == 4


def test_answers_are_reused_by_the_next_turn() -> None:
    blocks = BlockManager(8, 4)
    first = sequence(range(6))
    blocks.allocate(first)
    first.token_ids += [6, 7, 8]
    blocks.append(first)
    first.num_computed_tokens = 8
    blocks.commit(first)
    blocks.free(first)
    assert run_once(blocks, sequence(range(12))) == 8


@pytest.mark.parametrize("start", [0, 1, 5])
def test_different_images_never_share_blocks(start: int) -> None:
    blocks = BlockManager(20, 4)
    tokens = [0] * start + [7] * 10 + [1, 2, 3, 4]

    def request(content: bytes) -> Sequence:
        return sequence(tokens, images=[image_span(start, 10, content)])

    run_once(blocks, request(b"a"))
    assert run_once(blocks, request(b"b")) == start // 4 * 4
    assert run_once(blocks, request(b"a")) == (len(tokens) - 1) // 4 * 4


def test_the_place_inside_an_image_is_part_of_the_key() -> None:
    blocks = BlockManager(20, 4)
    run_once(blocks, sequence([7] * 9, images=[image_span(0, 9, b"a")]))
    shifted = [image_span(0, 3, b"x"), image_span(3, 6, b"a")]
    assert run_once(blocks, sequence([7] * 9, images=shifted)) == 0
    halves = [image_span(0, 4, b"a"), image_span(4, 5, b"a")]
    assert run_once(blocks, sequence([7] * 9, images=halves)) == 4


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    blocks = BlockManager(4, 4)
    run_once(blocks, sequence([1] * 8))
    run_once(blocks, sequence([2] * 8))
    blocks.allocate(sequence([3] * 4))
    assert blocks.num_free_blocks == 3
    probe = sequence([1] * 9)
    assert len(blocks._reusable(probe)) == 1
    assert len(blocks._reusable(sequence([2] * 9))) == 2


def test_without_prefix_caching_nothing_is_reused() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    run_once(blocks, sequence(range(8)))
    assert run_once(blocks, sequence(range(8))) == 0
