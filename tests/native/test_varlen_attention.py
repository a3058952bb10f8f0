"""VarlenAttention equals float64 attention inside each packed segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.native.attention_reference import (
    FLOAT32_TOLERANCE,
    INT8_TOLERANCE,
    ISAS,
    Array,
    assert_close,
    run_varlen,
    varlen_reference,
)

ERRORS = (Fail, InvalidArgument, RuntimeException)


def batch(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    size: int,
    seed: int = 0,
    v_size: int | None = None,
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    widths = {"query": heads * size, "key": kv_heads * size, "value": kv_heads * (v_size or size)}
    feed: dict[str, Array] = {
        name: rng.standard_normal((sum(lengths), n)).astype(np.float32)
        for name, n in widths.items()
    }
    feed["cu_seqlens"] = np.cumsum([0, *lengths], dtype=np.int32)
    return feed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lengths", [[1], [127, 128, 129], [3, 0, 40, 300], [0], []])
def test_segments_of_any_length(isa: str, lengths: list[int]) -> None:
    feed = batch(lengths, 3, 3, 64)
    output = run_varlen(feed, {"num_heads": 3}, isa)
    expected = varlen_reference(feed, 3, 3, 64**-0.5)
    assert_close(output, expected, feed["value"], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 24, 72, 80, 96, 128, 200, 256, 264, 512])
def test_head_sizes_and_shared_key_heads(isa: str, size: int) -> None:
    feed = batch([50, 140], 4, 2, size)
    scale = float(np.float32(1.5 * size**-0.5))
    attributes = {"num_heads": 4, "kv_num_heads": 2, "scale": scale}
    output = run_varlen(feed, attributes, isa)
    expected = varlen_reference(feed, 4, 2, scale)
    assert_close(output, expected, feed["value"], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "v_size"), [(192, 128), (8, 72), (40, 24), (24, 88), (8, 512), (504, 16)]
)
def test_values_may_have_another_head_size(isa: str, size: int, v_size: int) -> None:
    feed = batch([3, 140], 4, 2, size, v_size=v_size)
    output = run_varlen(feed, {"num_heads": 4, "kv_num_heads": 2}, isa)
    expected = varlen_reference(feed, 4, 2, size**-0.5)
    assert_close(output, expected, feed["value"], FLOAT32_TOLERANCE)
    int8 = run_varlen(feed, {"num_heads": 4, "kv_num_heads": 2, "compute_type": "int8"}, isa)
    assert_close(int8, expected, feed["value"], INT8_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 40, 64, 80, 128, 256, 328, 512])
def test_int8_rounds_each_channel_by_itself(isa: str, size: int) -> None:
    feed = batch([20, 300, 129], 2, 2, size)
    feed["value"][:, 3] *= 50  # one channel must not take the others' precision away
    output = run_varlen(feed, {"num_heads": 2, "compute_type": "int8"}, isa)
    expected = varlen_reference(feed, 2, 2, size**-0.5)
    for channel in range(2 * size):
        column = slice(channel, channel + 1)
        values = feed["value"][:, column]
        assert_close(output[:, column], expected[:, column], values, INT8_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_do_not_overflow(isa: str) -> None:
    feed = batch([200], 2, 2, 64)
    feed["query"] *= 100
    feed["key"] *= 100
    output = run_varlen(feed, {"num_heads": 2}, isa)
    scores_rounding = 1e-2  # scores near 10,000 are known to about 1e-3
    expected = varlen_reference(feed, 2, 2, 64**-0.5)
    assert_close(output, expected, feed["value"], scores_rounding)


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_a_segment_is_independent_of_the_batch_and_of_threads(compute_type: str) -> None:
    attributes = {"num_heads": 2, "compute_type": compute_type}
    feed = batch([37, 500, 90], 2, 2, 64)
    together = run_varlen(feed, attributes, threads=2)
    for begin, end in ((0, 37), (37, 537), (537, 627)):
        alone = {n: feed[n][begin:end] for n in ("query", "key", "value")}
        alone["cu_seqlens"] = np.array([0, end - begin], np.int32)
        output = run_varlen(alone, attributes, threads=1)
        np.testing.assert_array_equal(output, together[begin:end])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens", np.array([0, 7, 5, 10], np.int32), "cu_seqlens: decreases from 7 to 5"),
        ("cu_seqlens", np.array([0, 9], np.int32), "cu_seqlens: must end with .* 10, got 9"),
        ("cu_seqlens", np.array([1, 10], np.int32), "cu_seqlens: must start with 0"),
        ("cu_seqlens", np.array([], np.int32), "cu_seqlens: expected"),
        ("key", np.zeros((9, 32), np.float32), r"key: expected \[10, 32\], got \[9, 32\]"),
        ("value", np.zeros((9, 32), np.float32), r"value: expected \[10, 2 \* v_head_size\]"),
        ("value", np.zeros((10, 17), np.float32), r"value: expected \[10, 2 \* v_head_size\]"),
        ("value", np.zeros((10, 24), np.float32), "v_head_size 12 is not a multiple of 8"),
        ("query", np.zeros((10, 31), np.float32), "query: expected"),
        ("query", np.zeros((10, 24), np.float32), "head_size 12 is not a multiple of 8"),
        (
            "query",
            np.zeros((10, 1040), np.float32),
            "head_size 520 is not a multiple of 8 up to 512",
        ),
    ],
)
def test_malformed_inputs_are_named(name: str, value: Array, message: str) -> None:
    feed = batch([10], 2, 2, 16)
    feed[name] = value
    with pytest.raises(ERRORS, match=message):
        run_varlen(feed, {"num_heads": 2})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": 3, "kv_num_heads": 2}, "not a positive multiple of kv_num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 2, "compute_type": "float16"}, "compute_type: expected"),
        ({}, "attribute num_heads is required"),
    ],
)
def test_malformed_attributes_are_named(attributes: dict[str, int], message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        run_varlen(batch([10], 2, 2, 16), attributes)
