"""A sequence's result does not depend on its chunks, on the batch, on pages or on threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.native.attention_reference import ISAS, Array, run_paged
from tests.native.paged_batches import Shape, quantized, quantized_attributes, random_batch

PER_SEQUENCE = ("past_seqlens", "block_table")
PER_TOKEN = ("query", "key", "value", "attend_span")


def prepare(
    int8: bool,
    past: list[int],
    new: list[int],
    extra: dict[str, Any] | None = None,
    shape: Shape | None = None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    shape = shape or Shape()
    feed, attributes = random_batch(shape, past, new), shape.attributes | (extra or {})
    if int8:
        return quantized(feed, True), attributes | quantized_attributes(True)
    return feed, attributes


def assert_chunks_equal_the_whole(
    feed: dict[str, Array], attributes: dict[str, Any], isa: str, chunks: Sequence[int]
) -> None:
    """Prefills the one sequence of `feed` at once, then in chunks."""
    whole, key_cache, value_cache = run_paged(feed, attributes, isa)
    keys, values = feed["key_cache"], feed["value_cache"]
    done = 0
    for size in chunks:
        part = feed | {n: feed[n][done : done + size] for n in PER_TOKEN if n in feed}
        part |= {
            "key_cache": keys,
            "value_cache": values,
            "past_seqlens": np.array([done], np.int32),
            "cumulative_sequence_length": np.array([0, size], np.int32),
        }
        output, keys, values = run_paged(part, attributes, isa)
        np.testing.assert_array_equal(output, whole[done : done + size])
        done += size
    np.testing.assert_array_equal(keys, key_cache)
    np.testing.assert_array_equal(values, value_cache)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("extra", [{}, {"local_window_size": 50}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 5 + [295], [128, 172], [100, 1, 1, 198]], ids=str)
def test_chunked_prefill_equals_prefill_at_once(
    isa: str, int8: bool, extra: dict[str, Any], chunks: list[int]
) -> None:
    feed, attributes = prepare(int8, [0], [300], extra)
    assert_chunks_equal_the_whole(feed, attributes, isa, chunks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1, 72, 16, 40),
        Shape(2, 1, 24, 16, 56),
        Shape(1, 1, 8, 16, 64),
        Shape(2, 1, 512),
        Shape(3, 1, 328, 16, 376),
    ],
    ids=str,
)
def test_chunks_of_heads_of_any_size(isa: str, int8: bool, shape: Shape) -> None:
    feed, attributes = prepare(int8, [0], [200], shape=shape)
    assert_chunks_equal_the_whole(feed, attributes, isa, [1, 1, 130, 1, 2, 65])


def assert_same_alone_and_in_a_batch(
    feed: dict[str, Array], attributes: dict[str, Any], isa: str
) -> None:
    """Runs the batch, then each of its sequences by itself."""
    together, _, _ = run_paged(feed, attributes, isa)
    ends = feed["cumulative_sequence_length"]
    for i in range(len(ends) - 1):
        tokens = slice(ends[i], ends[i + 1])
        alone = feed | {n: feed[n][tokens] for n in PER_TOKEN if n in feed}
        alone |= {n: feed[n][i : i + 1] for n in PER_SEQUENCE}
        alone["cumulative_sequence_length"] = np.array([0, ends[i + 1] - ends[i]], np.int32)
        output, _, _ = run_paged(alone, attributes, isa)
        np.testing.assert_array_equal(output, together[tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(isa: str, int8: bool) -> None:
    feed, attributes = prepare(int8, [0, 500, 33, 0], [140, 1, 7, 260])
    assert_same_alone_and_in_a_batch(feed, attributes, isa)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("past", "new"), [([3000], [1]), ([0, 900], [200, 1])], ids=str)
def test_threads_do_not_change_the_result(int8: bool, past: list[int], new: list[int]) -> None:
    feed, attributes = prepare(int8, past, new)
    outputs = [run_paged(feed, attributes, threads=n)[0] for n in (1, 2, 5)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_pages_and_their_size_do_not_change_the_result() -> None:
    results = []
    for block_size in (1, 7, 16, 256):
        shape = Shape(block_size=block_size)
        feed = random_batch(shape, [0, 0], [200, 31])
        activations = random_batch(Shape(), [0, 0], [200, 31])
        feed |= {n: activations[n] for n in PER_TOKEN if n in activations}
        results.append(run_paged(feed, shape.attributes)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_padding_of_the_block_table_is_not_read() -> None:
    shape = Shape()
    feed = random_batch(shape, [20, 0], [4, 60])
    expected, _, _ = run_paged(feed, shape.attributes)
    feed["block_table"][0, 2:] = 2**31 - 1
    output, _, _ = run_paged(feed, shape.attributes)
    np.testing.assert_array_equal(output, expected)
