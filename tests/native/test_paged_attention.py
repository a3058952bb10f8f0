"""PagedAttention equals float64 attention over the cache, whatever the batch and its attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.native.attention_reference import (
    FLOAT32_TOLERANCE,
    INT8_CACHE_ERROR_RATIO,
    ISAS,
    PAGED_INPUTS,
    Array,
    assert_close,
    expected_caches,
    int8_tolerance,
    paged_reference,
    run_paged,
    session,
)
from tests.native.paged_batches import Shape, quantized, quantized_attributes, random_batch

# Prefill, chunked prefill and decode, alone and mixed; lengths around the key tile of 128.
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "prefill": ([0], [300]),
    "ragged_prefill": ([0, 0, 0], [1, 128, 45]),
    "chunk": ([130, 5], [70, 140]),
    "decode": ([0, 63, 127, 128, 700], [1, 1, 1, 1, 1]),
    "long_decode": ([2500], [1]),
    "mixed": ([0, 200, 17, 40], [150, 1, 0, 3]),
    "empty": ([4], [0]),
}


def check(feed: dict[str, Array], attributes: dict[str, Any], isa: str = "") -> None:
    """Runs the operator; compares the caches, then the output attending those caches."""
    output, key_cache, value_cache = run_paged(feed, attributes, isa)
    int8 = "k_scale" in feed
    for actual, expected in zip((key_cache, value_cache), expected_caches(feed, attributes),
                                strict=True):  # fmt: skip
        # An int8 entry lies within half a step of the number it stores.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=0.5001 if int8 else 1e-5)
    expected = paged_reference(feed, attributes, key_cache, value_cache)
    largest = np.nanmax(np.abs(value_cache.astype(np.float64))) * feed.get(
        "v_scale", np.ones(1)
    ).max(initial=0)  # fmt: skip
    assert_close(output, expected, largest, int8_tolerance(isa) if int8 else FLOAT32_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", BATCHES)
def test_batches(isa: str, name: str) -> None:
    shape = Shape()
    check(random_batch(shape, *BATCHES[name]), shape.attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_int8_caches(isa: str, per_channel: bool, name: str) -> None:
    shape = Shape()
    feed = quantized(random_batch(shape, *BATCHES[name]), per_channel)
    check(feed, shape.attributes | quantized_attributes(per_channel), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_an_int8_cache_err_little_next_to_the_cache(isa: str) -> None:
    shape = Shape()
    exact = random_batch(shape, [0], [400])
    feed = quantized(exact, True)
    for scale, name in (("k_scale", "key"), ("v_scale", "value")):  # no value is clipped
        largest = np.abs(exact[name]).max(axis=0) / 127
        feed[scale] = largest.reshape(feed[scale].shape)
    attributes = shape.attributes | quantized_attributes(True)
    output, key_cache, value_cache = run_paged(feed, attributes, isa)
    of_cache = paged_reference(feed, attributes, key_cache, value_cache)
    keys, values = expected_caches(exact, shape.attributes)
    wanted = paged_reference(exact, shape.attributes, keys, values)
    cache_error = np.sqrt(np.mean((of_cache - wanted) ** 2))
    error = np.sqrt(np.mean((output - wanted) ** 2))
    assert error < INT8_CACHE_ERROR_RATIO * cache_error


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 4, 80, 8),
        Shape(7, 1, 128, 32),
        Shape(2, 1, 8, 1),
        Shape(60, 1, 24, 16),
        Shape(8, 4, 256, 128),
        Shape(3, 3, 72, 5),
        Shape(4, 2, 192, 16, 128),
        Shape(6, 2, 40, 7, 24),
        Shape(5, 1, 24, 16, 88),
        Shape(2, 2, 8, 3, 72),
        Shape(4, 1, 16, 16, 56),
        Shape(2, 1, 512, 16),
        Shape(3, 1, 264, 16),
        Shape(2, 2, 312, 16, 504),
        Shape(4, 2, 512, 16, 8),
        Shape(10, 1, 8, 16, 512),
    ],
    ids=str,
)
def test_shapes(isa: str, int8: bool, shape: Shape) -> None:
    feed = random_batch(shape, [0, 150, 9], [140, 1, 20])
    if int8:
        check(quantized(feed, True), shape.attributes | quantized_attributes(True), isa)
    else:
        check(feed, shape.attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {"softcap": 2.0},
        {"scale": 0.3},
        {"local_window_size": 1},
        {"local_window_size": 40},
        {"local_window_size": 128, "softcap": 5.0},
        {"is_causal": 0},
        {"is_causal": 0, "local_window_size": 30},
    ],
    ids=str,
)
def test_attributes(isa: str, int8: bool, extra: dict[str, Any]) -> None:
    shape = Shape()
    feed, attributes = random_batch(shape, [0, 260, 40], [150, 1, 20]), shape.attributes | extra
    if int8:
        feed, attributes = quantized(feed, True), attributes | quantized_attributes(True)
    check(feed, attributes, isa)


@pytest.mark.parametrize("shape", [Shape(), Shape(6, 2, 64, 16, 40)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary", [{}, {"rotary_interleaved": 1}, {"rotary_offset": 16}, None])
@pytest.mark.parametrize("int8", [False, True])
def test_norm_and_rotary(
    shape: Shape, packed: bool, norm: bool, rotary: dict[str, int] | None, int8: bool
) -> None:
    feed = random_batch(shape, [0, 30], [20, 2], packed=packed)
    attributes = shape.attributes
    rng = np.random.default_rng(5)
    if norm:
        for name in ("q_norm_weight", "k_norm_weight"):
            feed[name] = rng.uniform(0.5, 1.5, shape.head_size).astype(np.float32)
        attributes["qk_norm_epsilon"] = 0.01
    if rotary is not None:
        half = 16 if "rotary_offset" in rotary else shape.head_size // 2
        angle = rng.uniform(0, 6, (40, half))
        feed["cos_cache"] = np.cos(angle).astype(np.float32)
        feed["sin_cache"] = np.sin(angle).astype(np.float32)
        attributes |= rotary | {"do_rotary": 1}
    if int8:
        feed, attributes = quantized(feed, True), attributes | quantized_attributes(True)
    check(feed, attributes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [[0.0, 1.0, -3.0], [50.0, -1e30, -np.inf]])
def test_head_sink(isa: str, sinks: list[float]) -> None:
    shape = Shape(3, 1)
    feed = random_batch(shape, [0, 140], [30, 1])
    feed["head_sink"] = np.array(sinks, np.float32)
    check(feed, shape.attributes, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("sink", [None, 0.5, -np.inf])
def test_unmapped_pages_are_neither_written_nor_attended(
    isa: str, int8: bool, sink: float | None
) -> None:
    shape = Shape()
    feed, attributes = random_batch(shape, [300, 0], [20, 40]), shape.attributes
    feed["block_table"][0, [0, 9, 18]] = -1
    feed["block_table"][1, :] = -1  # nothing to attend at all: the output is zero
    if sink is not None:
        feed["head_sink"] = np.full(shape.num_heads, sink, np.float32)
    if int8:
        feed, attributes = quantized(feed, False), attributes | quantized_attributes(False)
    check(feed, attributes, isa)


def test_slot_mapping_chooses_where_tokens_are_stored() -> None:
    shape = Shape()
    feed = random_batch(shape, [20, 0], [4, 3])
    feed["slot_mapping"] = np.array([-1, 3, -1, 7, 0, 1, 2], np.int32)
    feed["key_cache"], feed["value_cache"] = (
        np.nan_to_num(feed[n]) for n in ("key_cache", "value_cache")
    )
    check(feed, shape.attributes)


def test_int8_storing_rounds_to_even_and_saturates() -> None:
    shape = Shape(1, 1, 8, 4)
    feed = quantized(random_batch(shape, [0], [1]), False)
    feed["k_scale"] = feed["v_scale"] = np.array([0.5], np.float32)
    feed["key"] = np.array([[0.25, 0.75, -0.25, -0.75, 1e30, -1e30, 63.5, -64.0]], np.float32)
    _, key_cache, _ = run_paged(feed, shape.attributes | quantized_attributes(False))
    stored = key_cache[feed["block_table"][0, 0], 0, 0]
    assert stored.tolist() == [0, 2, 0, -2, 127, -128, 127, -128]


@pytest.mark.parametrize("int8", [False, True])
def test_cache_outputs_equal_the_updated_inputs(int8: bool) -> None:
    shape = Shape()
    feed, attributes = random_batch(shape, [20], [4]), shape.attributes
    feed = {n: np.nan_to_num(x) for n, x in feed.items()}
    if int8:
        feed, attributes = quantized(feed, True), attributes | quantized_attributes(True)
    kind = TensorProto.INT8 if int8 else TensorProto.FLOAT
    outputs = {"output": TensorProto.FLOAT, "key_cache_out": kind, "value_cache_out": kind}
    paged = session("PagedAttention", "com.microsoft", PAGED_INPUTS, feed, attributes, outputs)
    copies = {n: x.copy() for n, x in feed.items()}
    output, keys, values = paged.run(None, copies)
    expected = run_paged(feed, attributes)
    for actual, wanted in zip((output, keys, values), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
