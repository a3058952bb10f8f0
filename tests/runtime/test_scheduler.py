"""Scheduling policy: budgets, chunks, order, preemption."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmcompile.errors import InputError
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.scheduler import Schedule, Scheduler
from glmcompile.runtime.sequence import Chunk, Sequence, State
from tests.runtime.sequences import image_span, sequence


def scheduler(
    num_blocks: int = 64,
    budget: int = 16,
    max_sequences: int = 8,
    block_size: int = 4,
    encoded: Collection[bytes] = (),
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, budget, max_sequences, lambda image: image.digest in encoded)


def step(policy: Scheduler, prefill_tokens: int | None = None) -> list[tuple[Sequence, int, int]]:
    """Run one step: every sequence that samples gets a token; returns what was computed."""
    chunks = policy.schedule(prefill_tokens).chunks
    for chunk in chunks:
        policy.complete(chunk)
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
    assert policy.schedule() == Schedule()


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
    assert policy.waiting == [young, waiting]


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


def test_prefill_beside_decodes_takes_no_more_than_it_is_allowed() -> None:
    policy = scheduler(budget=64)
    decoding, first, second = sequence([1] * 5), sequence([2] * 30), sequence([3] * 30)
    policy.add(decoding)
    step(policy)
    policy.add(first)
    policy.add(second)
    assert step(policy, 20) == [(decoding, 5, 1), (first, 0, 20)]
    assert step(policy, 20) == [(decoding, 6, 1), (first, 20, 10), (second, 0, 10)]
    assert step(policy, 0) == [(decoding, 7, 1), (first, 30, 1)]


def test_tokens_that_a_grammar_forced_are_computed_as_one_decode() -> None:
    policy = scheduler(budget=16)
    item = sequence(range(5))
    policy.add(item)
    step(policy)
    item.token_ids += [7, 7, 7]
    assert step(policy, 0) == [(item, 5, 4)]


def test_an_images_tokens_wait_for_its_features_and_the_text_before_it_does_not() -> None:
    encoded: set[bytes] = set()
    policy = scheduler(encoded=encoded)
    first, second = image_span(3, 4, b"first"), image_span(9, 4, b"second")
    item = sequence(range(15), images=[first, second])
    policy.add(item)
    plan = policy.schedule()
    assert [image.digest for image in plan.images] == [first.image.digest, second.image.digest]
    assert plan.admitted == [item]
    assert [(chunk.start, chunk.count) for chunk in plan.chunks] == [(0, 3)]
    policy.complete(plan.chunks[0])
    assert policy.schedule().chunks == []
    encoded.add(first.image.digest)
    plan = policy.schedule()
    assert [(chunk.start, chunk.count) for chunk in plan.chunks] == [(3, 6)]
    assert [image.digest for image in plan.images] == [second.image.digest]
    encoded.add(second.image.digest)
    policy.complete(plan.chunks[0])
    assert step(policy) == [(item, 9, 6)]


def test_others_go_on_while_one_waits_for_an_image() -> None:
    policy = scheduler()
    shown, text = sequence(range(9), images=[image_span(0, 4, b"image")]), sequence([1] * 6)
    policy.add(shown)
    policy.add(text)
    assert step(policy) == [(text, 0, 6)]
    assert step(policy) == [(text, 6, 1)]


def test_images_in_a_reused_prefix_are_not_encoded_again() -> None:
    encoded = {image_span(0, 8, b"image").image.digest}
    policy = scheduler(encoded=encoded)
    first = sequence(range(14), max_tokens=1, images=[image_span(0, 8, b"image")])
    policy.add(first)
    step(policy)
    encoded.clear()
    policy.add(sequence(range(14), images=[image_span(0, 8, b"image")]))
    plan = policy.schedule()
    assert plan.images == []
    assert [(chunk.start, chunk.count) for chunk in plan.chunks] == [(12, 2)]


def test_a_lower_priority_number_is_admitted_first_and_preempted_last() -> None:
    policy = scheduler(num_blocks=4, max_sequences=2)
    late, early, second = sequence([1] * 3), sequence([2] * 7), sequence([3] * 3)
    late.priority, early.priority, second.priority = 5, -1, 5
    for item in (late, second, early):
        policy.add(item)
    assert policy.waiting == [early, late, second]
    step(policy)
    assert policy.running == [early, late]
    while not late.num_preemptions:
        step(policy)
    assert early.num_preemptions == 0
    assert policy.waiting == [late, second]


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
        chunks = policy.schedule().chunks
        check(policy, chunks, budget)
        for chunk in chunks:
            policy.complete(chunk)
            if chunk.samples:
                chunk.sequence.token_ids.append(5)
                if chunk.sequence.num_answer_tokens == chunk.sequence.max_tokens:
                    policy.remove(chunk.sequence)
    assert all(item.num_answer_tokens == item.max_tokens for item in items)
    policy._blocks.check_integrity([])
    assert policy._blocks.num_free_blocks == num_blocks


def check(policy: Scheduler, chunks: list[Chunk], budget: int) -> None:
    assert sum(chunk.count for chunk in chunks) <= budget
    assert chunks or not policy.has_work
    for chunk in chunks:
        assert chunk.count > 0
        assert chunk.start == chunk.sequence.num_computed_tokens
        assert len(chunk.sequence.block_table) * 4 >= chunk.end
        assert chunk.sequence in policy.running
