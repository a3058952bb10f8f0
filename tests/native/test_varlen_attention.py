"""VarlenAttention equals float64 attention inside each packed segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    keys: Sequence[int] | None = None,
) -> dict[str, Array]:
    """Segments of these lengths; of so many keys, where their number is another."""
    rng = np.random.default_rng(seed)
    tokens, key_tokens = sum(lengths), sum(lengths if keys is None else keys)
    shapes = {
        "query": (tokens, heads * size),
        "key": (key_tokens, kv_heads * size),
        "value": (key_tokens, kv_heads * (v_size or size)),
    }
    feed: dict[str, Array] = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    feed["cu_seqlens"] = np.cumsum([0, *lengths], dtype=np.int32)
    if keys is not None:
        feed["cu_seqlens_k"] = np.cumsum([0, *keys], dtype=np.int32)
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


# Queries and keys of segments: some without queries, some without keys, fewer or more keys.
CROSS = {
    "more_keys": ([3, 40, 1], [300, 129, 128]),
    "fewer_keys": ([300, 129, 5], [3, 128, 4]),
    "gaps": ([0, 50, 7, 0, 33], [20, 0, 130, 0, 33]),
    "ends_without_keys": ([140, 400], [260, 0]),
    "no_keys": ([300, 2], [0, 0]),
    "no_queries": ([0], [30]),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("name", CROSS)
def test_keys_of_their_own(isa: str, compute_type: str, causal: int, name: str) -> None:
    lengths, keys = CROSS[name]
    feed = batch(lengths, 4, 2, 40, v_size=72, keys=keys)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "is_causal": causal}
    output = run_varlen(feed, attributes | {"compute_type": compute_type}, isa)
    expected = varlen_reference(feed, 4, 2, 40**-0.5, causal=bool(causal))
    tolerance = INT8_TOLERANCE if compute_type == "int8" else FLOAT32_TOLERANCE
    assert_close(output, expected, feed["value"], tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
@pytest.mark.parametrize("causal", [0, 1])
def test_softcap(isa: str, compute_type: str, causal: int) -> None:
    feed = batch([3, 140, 300], 2, 2, 64)
    feed["key"] += 3  # a mean that no cap may be moved by
    attributes = {"num_heads": 2, "softcap": 2.0, "is_causal": causal}
    output = run_varlen(feed, attributes | {"compute_type": compute_type}, isa)
    expected = varlen_reference(feed, 2, 2, 64**-0.5, 2.0, bool(causal))
    tolerance = INT8_TOLERANCE if compute_type == "int8" else FLOAT32_TOLERANCE
    assert_close(output, expected, feed["value"], tolerance)


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
@pytest.mark.parametrize("lengths", [[3, 0, 140], [1], []], ids=str)
def test_keys_packed_like_queries_need_no_offsets(compute_type: str, lengths: list[int]) -> None:
    attributes = {"num_heads": 2, "compute_type": compute_type}
    feed = batch(lengths, 2, 2, 64)
    expected = run_varlen(feed, attributes)
    output = run_varlen(feed | {"cu_seqlens_k": feed["cu_seqlens"]}, attributes)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [0, 1])
def test_queries_attend_alone_as_together(isa: str, causal: int) -> None:
    feed = batch([200], 4, 2, 64, keys=[300])
    attributes = {"num_heads": 4, "kv_num_heads": 2, "is_causal": causal, "softcap": 3.0}
    together = run_varlen(feed, attributes, isa)
    for begin, end in ((0, 1), (1, 150), (150, 200)):
        last_key = 100 + end if causal else 300
        part = {"query": feed["query"][begin:end]}
        part |= {name: feed[name][:last_key] for name in ("key", "value")}
        part |= {"cu_seqlens": np.array([0, end - begin], np.int32)}
        part |= {"cu_seqlens_k": np.array([0, last_key], np.int32)}
        np.testing.assert_array_equal(run_varlen(part, attributes, isa), together[begin:end])


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


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
@pytest.mark.parametrize("causal", [0, 1])
def test_a_segment_with_keys_of_its_own_is_independent(compute_type: str, causal: int) -> None:
    attributes = {"num_heads": 2, "compute_type": compute_type, "is_causal": causal}
    feed = batch([37, 500, 2, 90], 2, 2, 64, keys=[200, 60, 0, 700])
    together = run_varlen(feed, attributes, threads=2)
    cu_q, cu_k = feed["cu_seqlens"], feed["cu_seqlens_k"]
    for i in range(4):
        alone = {"query": feed["query"][cu_q[i] : cu_q[i + 1]]}
        alone |= {name: feed[name][cu_k[i] : cu_k[i + 1]] for name in ("key", "value")}
        alone |= {
            "cu_seqlens": cu_q[i : i + 2] - cu_q[i],
            "cu_seqlens_k": cu_k[i : i + 2] - cu_k[i],
        }
        output = run_varlen(alone, attributes, threads=1)
        np.testing.assert_array_equal(output, together[cu_q[i] : cu_q[i + 1]])


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
    ("name", "value", "message"),
    [
        ("cu_seqlens_k", np.array([0, 7, 5], np.int32), "cu_seqlens_k: decreases from 7 to 5"),
        ("cu_seqlens_k", np.array([0, 4, 10], np.int32), "cu_seqlens_k: must end with .* 11, got"),
        ("cu_seqlens_k", np.array([2, 4, 11], np.int32), "cu_seqlens_k: must start with 0, got 2"),
        ("cu_seqlens_k", np.array([0, 11], np.int32), r"cu_seqlens_k: expected \[3\], got \[2\]"),
        ("key", np.zeros((11, 24), np.float32), r"key: expected \[key tokens, 32\], got \[11, 24"),
        ("value", np.zeros((9, 32), np.float32), r"value: expected \[11, 2 \* v_head_size\]"),
    ],
)
def test_malformed_keys_of_their_own_are_named(name: str, value: Array, message: str) -> None:
    feed = batch([4, 5], 2, 2, 16, keys=[3, 8])
    feed[name] = value
    with pytest.raises(ERRORS, match=message):
        run_varlen(feed, {"num_heads": 2})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": 3, "kv_num_heads": 2}, "not a positive multiple of kv_num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 2, "compute_type": "float16"}, "compute_type: expected"),
        ({"num_heads": 2, "softcap": -1.0}, "softcap: expected 0 or a positive number, got -1"),
        ({"num_heads": 2, "softcap": float("nan")}, "softcap: expected"),
        ({}, "attribute num_heads is required"),
    ],
)
def test_malformed_attributes_are_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        run_varlen(batch([10], 2, 2, 16), attributes)
