"""What com.glmcompile::PagedAttention adds to ONNX Runtime's: images seen whole, and ALiBi."""

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


def slopes(heads: int) -> Array:
    """A geometric sequence from 1/2 on, as ALiBi's, of which one is 0 and one is rising."""
    steep = 0.5 ** (1 + 8 * np.arange(heads) / heads)
    steep[heads // 2] = 0
    steep[-1] *= -1
    return steep.astype(np.float32)


def prepare(
    shape: Shape,
    past: list[int],
    new: list[int],
    int8: bool,
    extra: dict[str, Any] | None = None,
    images: bool = True,
    alibi: bool = False,
) -> tuple[dict[str, Array], dict[str, Any]]:
    feed, attributes = random_batch(shape, past, new), shape.attributes | (extra or {})
    if images:
        feed["attend_span"] = image_spans(feed)
    if alibi:
        feed["alibi_slopes"] = slopes(shape.num_heads)
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
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("window", [-1, 30])
@pytest.mark.parametrize("name", BATCHES)
def test_alibi(isa: str, int8: bool, images: bool, window: int, name: str) -> None:
    extra = {"local_window_size": window}
    feed, attributes = prepare(Shape(), *BATCHES[name], int8, extra, images, alibi=True)
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"is_causal": 0}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(4, 1, 40, 7, 72), Shape(12, 12, 24, 5), Shape(30, 1, 16, 16, 8)], ids=str
)
def test_with_other_attributes_and_shapes(
    isa: str, int8: bool, alibi: bool, extra: dict[str, Any], shape: Shape
) -> None:
    extra = extra | {"local_window_size": 20}
    feed, attributes = prepare(shape, [0, 150, 9], [240, 1, 90], int8, extra, alibi=alibi)
    if alibi and not attributes.get("is_causal", 1):
        # Else keys far ahead score in hundreds, of which float32 rounds off too much to compare.
        feed["alibi_slopes"] /= 16
    feed["head_sink"] = np.linspace(-2, 3, shape.num_heads).astype(np.float32)
    check(feed, attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_unmapped_pages_of_an_image_are_not_attended(isa: str, int8: bool) -> None:
    feed, attributes = prepare(Shape(), [60], [250], int8, alibi=True)
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
    flat = np.zeros(attributes["num_heads"], np.float32)
    for empty in (np.zeros_like(spans), np.repeat(spans[:, :1], 2, axis=1)):
        for extension in ({"attend_span": empty}, {"attend_span": empty, "alibi_slopes": flat}):
            output = run_paged(feed | extension, attributes, isa)[0]
            np.testing.assert_array_equal(output, expected)


def test_spans_end_with_the_keys_that_are_there() -> None:
    feed, attributes = prepare(Shape(), [5], [50], False)
    feed["attend_span"] = np.tile(np.array([0, 55], np.int32), (50, 1))
    expected = run_paged(feed, attributes)[0]
    feed["attend_span"][:, 1] = 2**31 - 1
    np.testing.assert_array_equal(run_paged(feed, attributes)[0], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [-1, 30])
def test_chunks_that_keep_images_whole_equal_the_whole(
    isa: str, int8: bool, alibi: bool, window: int
) -> None:
    feed, attributes = prepare(
        Shape(), [0], [300], int8, {"local_window_size": window}, alibi=alibi
    )
    # Text and images of image_spans, by turns: 3, 1, 40, 7, 150, 3, 1, ...
    assert_chunks_equal_the_whole(feed, attributes, isa, [1, 1, 1, 1, 20, 20, 7, 150, 4, 95])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(isa: str, int8: bool, alibi: bool) -> None:
    feed, attributes = prepare(Shape(), [0, 500, 33, 0], [140, 1, 7, 260], int8, alibi=alibi)
    assert_same_alone_and_in_a_batch(feed, attributes, isa)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("past", "new"), [([3000], [4]), ([0, 900], [300, 1])], ids=str)
def test_threads_do_not_change_the_result(
    int8: bool, alibi: bool, past: list[int], new: list[int]
) -> None:
    feed, attributes = prepare(Shape(), past, new, int8, alibi=alibi)
    feed["attend_span"] = image_spans(feed, (1, 3, 2, 250))
    outputs = [run_paged(feed, attributes, threads=n)[0] for n in (1, 2, 5)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_decode_equals_prefill_under_alibi(isa: str, int8: bool) -> None:
    feed, attributes = prepare(Shape(), [0], [270], int8, images=False, alibi=True)
    assert_chunks_equal_the_whole(feed, attributes, isa, [120, *[1] * 12, 2, 3, 4, 129])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_slopes_of_queries_that_are_zero(isa: str, int8: bool) -> None:
    """Queries of 8 bits have no scale then, yet distances still count."""
    feed, attributes = prepare(Shape(), [200], [5], int8, alibi=True)
    feed["query"][:] = 0
    check(feed, attributes, isa)
