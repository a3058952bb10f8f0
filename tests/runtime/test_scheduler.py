"""Scheduling policy: budgets, chunks, order, preemption."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmcompile.errors import InputError
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.scheduler import Scheduler
from glmcompile.runtime.sequence import Chunk, Sequence, State
from tests.runtime.sequences import sequence


def scheduler(
    num_blocks: int = 64, budget: int = 16, max_sequences: int = 8, block_size: int = 4
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, budget, max_sequences)


def step(policy: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Run one step: every sequence that samples gets a token; returns what was computed."""
    chunks = policy.schedule()
    policy.complete(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.token_ids.append(1000 + len(chunk.sequence))
            if chunk.sequence.num_answer_tokens >= chunk.sequence.max_tokens:
                policy.remove(chunk.sequence)
    return [(chunk.sequence, chunk.start, chunk.count) for chunk in chunks]


def test_long_prompts_are_computed_in_chunks_of_the_budget() -> None:
    policy = scheduler(budget=16)
    item = sequence(range(40))
    policy.add(item)
    assert step(policy) == [(item, 0, 16)]
    assert step(policy) == [(item, 16, 16)]
    assert step(policy) == [(item, 32, 8)]
    assert step(policy) == [(item, 40, 1)]


def test_decodes_come_first_and_prefill_fills_the_rest() -> None:
    policy = scheduler(budget=16)
    first, second = sequence(range(5)), sequence(range(100, 130))
    policy.add(first)
    assert step(policy) == [(first, 0, 5)]
    policy.add(second)
    assert step(policy) == [(first, 5, 1), (second, 0, 15)]
    assert step(policy) == [(first, 6, 1), (second, 15, 15)]
    assert step(policy) == [(first, 7, 1), (second, 30, 1)]


def test_requests_join_and_leave_between_steps() -> None:
    policy = scheduler()
    first, second = sequence([1], max_tokens=2), sequence([2], max_tokens=3)
    policy.add(first)
    step(policy)
    policy.add(second)
    assert {item for item, *_ in step(policy)} == {first, second}
    assert {item for item, *_ in step(policy)} == {second}
    step(policy)
    assert not policy.has_work
    assert policy.schedule() == []


def test_at_most_max_sequences_run_and_others_wait_in_order() -> None:
    policy = scheduler(max_sequences=2)
    items = [sequence([i], max_tokens=2) for i in range(4)]
    for item in items:
        policy.add(item)
    assert [item for item, *_ in step(policy)] == items[:2]
    step(policy)
    assert [item for item, *_ in step(policy)] == items[2:]


def test_the_youngest_is_preempted_and_starts_over_with_its_answer() -> None:
    policy = scheduler(num_blocks=4, budget=16)
    old, young = sequence([1] * 7), sequence([2] * 3)
    policy.add(old)
    policy.add(young)
    step(policy)
    assert policy.running == [old, young]
    while not young.num_preemptions:
        step(policy)
    assert young.state is State.WAITING
    assert young.block_table == []
    answer = young.answer_ids
    assert answer
    policy.remove(old)
    computed = step(policy)
    # Its full blocks are still cached; the rest is computed again in one chunk.
    assert computed == [(young, len(young) - 1 - computed[0][2], computed[0][2])]
    assert young.answer_ids[: len(answer)] == answer


def test_a_preempted_sequence_goes_ahead_of_those_that_never_ran() -> None:
    policy = scheduler(num_blocks=4)
    old, young, waiting = sequence([1] * 7), sequence([2] * 3), sequence([3] * 8)
    for item in (old, young, waiting):
        policy.add(item)
    while not young.num_preemptions:
        step(policy)
    assert list(policy.waiting) == [young, waiting]


def test_a_shared_prefix_is_not_computed_again() -> None:
    policy = scheduler(budget=64)
    first = sequence(range(20), max_tokens=1)
    policy.add(first)
    step(policy)
    second = sequence([*range(18), 99, 98])
    policy.add(second)
    assert step(policy) == [(second, 16, 4)]
    assert second.num_cached_tokens == 16


def test_a_prompt_larger_than_the_cache_is_refused_with_both_numbers() -> None:
    policy = scheduler(num_blocks=4)
    with pytest.raises(InputError, match="17 tokens but the KV cache holds 16"):
        policy.fit(sequence(range(17)))


def test_an_answer_ends_where_the_cache_does() -> None:
    policy = scheduler(num_blocks=4)
    item = sequence(range(14), max_tokens=100)
    policy.fit(item)
    policy.add(item)
    while policy.has_work:
        step(policy)
    # 16 tokens are in the cache; the 17th is sampled from the 16th and never fed back.
    assert len(item) == 17
    assert item.num_preemptions == 0


def test_removing_gives_back_blocks_in_any_state() -> None:
    policy = scheduler(num_blocks=4, max_sequences=1)
    running, waiting = sequence(range(9)), sequence(range(9))
    policy.add(running)
    policy.add(waiting)
    step(policy)
    for item in (waiting, running, running):
        policy.remove(item)
        assert item.state is State.FINISHED
    assert policy._blocks.num_free_blocks == 4
    assert not policy.has_work


@pytest.mark.parametrize(("budget", "sequences"), [(4, 8), (0, 0), (8, 0)])
def test_a_budget_too_small_for_a_token_each_is_refused(budget: int, sequences: int) -> None:
    with pytest.raises(InputError, match="max_batched_tokens"):
        scheduler(budget=budget, max_sequences=sequences)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.integers(0, 10)),
        max_size=12,
    ),
    num_blocks=st.integers(8, 20),
    budget=st.integers(4, 24),
)
@settings(max_examples=200, deadline=None)
def test_every_request_finishes_in_any_mixture(
    requests: list[tuple[int, int, int, int]], num_blocks: int, budget: int
) -> None:
    policy = scheduler(num_blocks=num_blocks, budget=budget, max_sequences=4)
    arrivals = sorted(requests, key=lambda request: request[3])
    items: list[Sequence] = []
    for tick in range(2000):
        while arrivals and arrivals[0][3] <= tick:
            length, answer, token, _ = arrivals.pop(0)
            items.append(sequence([token] * length, max_tokens=answer))
            policy.fit(items[-1])
            policy.add(items[-1])
        if not policy.has_work and not arrivals:
            break
        chunks = policy.schedule()
        check(policy, chunks, budget)
        policy.complete(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.token_ids.append(5)
                if chunk.sequence.num_answer_tokens == chunk.sequence.max_tokens:
                    policy.remove(chunk.sequence)
    assert all(item.num_answer_tokens == item.max_tokens for item in items)
    assert policy._blocks.num_free_blocks == num_blocks


def check(policy: Scheduler, chunks: list[Chunk], budget: int) -> None:
    assert sum(chunk.count for chunk in chunks) <= budget
    assert chunks or not policy.has_work
    for chunk in chunks:
        assert chunk.count > 0
        assert chunk.start == chunk.sequence.num_computed_tokens
        assert len(chunk.sequence.block_table) * 4 >= chunk.end
        assert chunk.sequence in policy.running
