"""What com.glmcompile::PagedAttention adds to ONNX Runtime's: images that see themselves whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.native.attention_reference import ISAS, Array, run_paged
from tests.native.paged_batches import (
    Shape,
    image_spans,
    quantized,
    quantized_attributes,
    random_batch,
)
from tests.native.test_paged_attention import BATCHES, check
from tests.native.test_paged_attention_independence import (
    assert_chunks_equal_the_whole,
    assert_same_alone_and_in_a_batch,
)


def prepare(
    shape: Shape, past: list[int], new: list[int], int8: bool, extra: dict[str, Any] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    feed, attributes = random_batch(shape, past, new), shape.attributes | (extra or {})
    feed["attend_span"] = image_spans(feed)
    if int8:
        return quantized(feed, True), attributes | quantized_attributes(True)
    return feed, attributes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [-1, 1, 30, 128])
@pytest.mark.parametrize("name", BATCHES)
def test_tokens_of_one_image_see_each_other(isa: str, int8: bool, window: int, name: str) -> None:
    feed, attributes = prepare(Shape(), *BATCHES[name], int8, {"local_window_size": window})
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"is_causal": 0}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(4, 1, 40, 7, 72), Shape(12, 12, 24, 5), Shape(30, 1, 16, 16, 8)], ids=str
)
def test_with_other_attributes_and_shapes(
    isa: str, int8: bool, extra: dict[str, Any], shape: Shape
) -> None:
    extra = extra | {"local_window_size": 20}
    feed, attributes = prepare(shape, [0, 150, 9], [240, 1, 90], int8, extra)
    feed["head_sink"] = np.linspace(-2, 3, shape.num_heads).astype(np.float32)
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_unmapped_pages_of_an_image_are_not_attended(isa: str, int8: bool) -> None:
    feed, attributes = prepare(Shape(), [60], [250], int8)
    feed["block_table"][0, [4, 5, 11]] = -1
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_an_image_longer_than_tiles_and_tasks(isa: str) -> None:
    feed, attributes = prepare(Shape(), [0], [700], False, {"local_window_size": 10})
    feed["attend_span"] = image_spans(feed, (20, 600))
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [-1, 30])
def test_spans_without_order_see_all_between(isa: str, int8: bool, window: int) -> None:
    """As the formula has it: the keys between a window and a span that it does not touch."""
    feed, attributes = prepare(Shape(), [40], [200], int8, {"local_window_size": window})
    rng = np.random.default_rng(2)
    position = np.arange(40, 240)
    first = rng.integers(0, position + 1)
    feed["attend_span"] = np.stack([first, rng.integers(first, 241)], axis=1).astype(np.int32)
    actual = run_paged(feed, attributes, isa)[0]
    begin, end = feed["attend_span"].T
    filled = feed | {
        "attend_span": np.stack(
            [begin, np.where(begin < end, np.maximum(end, position + 1), end)], axis=1
        ).astype(np.int32)
    }
    check(filled, attributes, isa)
    np.testing.assert_array_equal(actual, run_paged(filled, attributes, isa)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_without_images_it_is_onnx_runtimes_operator(isa: str, int8: bool) -> None:
    feed, attributes = prepare(Shape(), [30, 0], [200, 1], int8, {"local_window_size": 40})
    spans = feed.pop("attend_span")
    expected = run_paged(feed, attributes, isa)[0]
    for empty in (np.zeros_like(spans), np.repeat(spans[:, :1], 2, axis=1)):
        output = run_paged(feed | {"attend_span": empty}, attributes, isa)[0]
        np.testing.assert_array_equal(output, expected)


def test_spans_end_with_the_keys_that_are_there() -> None:
    feed, attributes = prepare(Shape(), [5], [50], False)
    feed["attend_span"] = np.tile(np.array([0, 55], np.int32), (50, 1))
    expected = run_paged(feed, attributes)[0]
    feed["attend_span"][:, 1] = 2**31 - 1
    np.testing.assert_array_equal(run_paged(feed, attributes)[0], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [-1, 30])
def test_chunks_that_keep_images_whole_equal_the_whole(isa: str, int8: bool, window: int) -> None:
    feed, attributes = prepare(Shape(), [0], [300], int8, {"local_window_size": window})
    # Text and images of image_spans, by turns: 3, 1, 40, 7, 150, 3, 1, ...
    assert_chunks_equal_the_whole(feed, attributes, isa, [1, 1, 1, 1, 20, 20, 7, 150, 4, 95])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(isa: str, int8: bool) -> None:
    feed, attributes = prepare(Shape(), [0, 500, 33, 0], [140, 1, 7, 260], int8)
    assert_same_alone_and_in_a_batch(feed, attributes, isa)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("past", "new"), [([3000], [4]), ([0, 900], [300, 1])], ids=str)
def test_threads_do_not_change_the_result(int8: bool, past: list[int], new: list[int]) -> None:
    feed, attributes = prepare(Shape(), past, new, int8)
    feed["attend_span"] = image_spans(feed, (1, 3, 2, 250))
    outputs = [run_paged(feed, attributes, threads=n)[0] for n in (1, 2, 5)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
