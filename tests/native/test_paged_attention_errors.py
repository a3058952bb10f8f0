"""Malformed inputs of PagedAttention are named, and leave the caches as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    RuntimeException,
)

from tests.native.attention_reference import (
    EXTENDED_INPUTS,
    PAGED_INPUTS,
    Array,
    run_paged,
    session,
)
from tests.native.paged_batches import (
    Shape,
    image_spans,
    quantized,
    quantized_attributes,
    random_batch,
)

# A run with I/O binding reports a failed node as the builtin RuntimeError.
ERRORS = (Fail, InvalidArgument, RuntimeException, RuntimeError)
SHAPE = Shape(4, 2, 16, 8)

Feed = dict[str, Array]
Change = Callable[[Feed], Any]


def batch() -> Feed:
    feed = random_batch(SHAPE, [5, 0, 20], [3, 9, 1])
    return {name: np.nan_to_num(array) for name, array in feed.items()}


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


CHANGES: dict[str, tuple[Change, str]] = {
    "cumulative decreases": (
        lambda f: f.update(cumulative_sequence_length=int32(0, 9, 8, 13)),
        "cumulative_sequence_length: decreases from 9 to 8",
    ),
    "cumulative ends early": (
        lambda f: f.update(cumulative_sequence_length=int32(0, 3, 12, 12)),
        "cumulative_sequence_length: must end with the number of tokens 13, got 12",
    ),
    "cumulative ends late": (
        lambda f: f.update(cumulative_sequence_length=int32(0, 3, 12, 1000)),
        "cumulative_sequence_length: must end with",
    ),
    "cumulative starts late": (
        lambda f: f.update(cumulative_sequence_length=int32(1, 3, 12, 13)),
        "cumulative_sequence_length: must start with 0",
    ),
    "cumulative empty": (
        lambda f: f.update(cumulative_sequence_length=int32()),
        "cumulative_sequence_length: expected",
    ),
    "past negative": (
        lambda f: f.update(past_seqlens=int32(5, -1, 20)),
        "past_seqlens: entry 1 is negative: -1",
    ),
    "past of another length": (
        lambda f: f.update(past_seqlens=int32(5, 0)),
        r"past_seqlens: expected \[3\], got \[2\]",
    ),
    "past beyond the table": (
        lambda f: f.update(past_seqlens=int32(5, 0, 2**31 - 1)),
        "block_table: sequence 2 has 2147483648 tokens",
    ),
    "table too narrow": (
        lambda f: f.update(block_table=f["block_table"][:, :2]),
        "block_table: sequence 2 .* needs 3 blocks of 8, got 2",
    ),
    "table of other sequences": (
        lambda f: f.update(block_table=f["block_table"][:2]),
        "block_table: expected",
    ),
    "block too large": (
        lambda f: f["block_table"].__setitem__((1, 1), len(f["key_cache"])),
        r"block_table: entry \[1, 1\] is",
    ),
    "block below -1": (
        lambda f: f["block_table"].__setitem__((2, 0), -2),
        r"block_table: entry \[2, 0\] is -2",
    ),
    "slot too large": (
        lambda f: f.update(slot_mapping=np.arange(13, dtype=np.int32) + 10**6),
        "slot_mapping: entry 0 is 1000000",
    ),
    "slot below -1": (
        lambda f: f.update(slot_mapping=np.arange(13, dtype=np.int32) - 2),
        "slot_mapping: entry 0 is -2",
    ),
    "slots of another length": (
        lambda f: f.update(slot_mapping=int32(1, 2)),
        r"slot_mapping: expected \[13\], got \[2\]",
    ),
    "query width": (lambda f: f.update(query=f["query"][:, :60]), "query: "),
    "key rows": (lambda f: f.update(key=f["key"][:12]), r"key: expected \[13, 32\]"),
    "value width": (lambda f: f.update(value=f["value"][:, :16]), r"value: expected \[13, 32\]"),
    "key without value": (lambda f: f.pop("value"), "key and value must be given together"),
    "key cache heads": (
        lambda f: f.update(key_cache=f["key_cache"][:, :, :1].copy()),
        "key_cache: expected",
    ),
    "value cache blocks": (
        lambda f: f.update(value_cache=f["value_cache"][:-1].copy()),
        "value_cache: expected the blocks of key_cache",
    ),
    "values of another size than their cache": (
        lambda f: f.update(value_cache=f["value_cache"][..., :8].copy()),
        r"value: expected \[13, 16\]",
    ),
    "key head size": (
        lambda f: f.update(key_cache=f["key_cache"][..., :12].copy()),
        "key_cache: head_size 12 is not a multiple of 8",
    ),
    "largest head size": (
        lambda f: f.update(key_cache=np.zeros((*f["key_cache"].shape[:3], 520), np.float32)),
        "key_cache: head_size 520 is not a multiple of 8 up to 512",
    ),
    "value head size": (
        lambda f: f.update(value_cache=f["value_cache"][..., :12].copy()),
        "value_cache: head_size 12 is not a multiple of 8",
    ),
    "packed width": (
        lambda f: [f.pop("key"), f.pop("value")],
        r"query: expected \[13, 128\] \(packed QKV\)",
    ),
    "sink size": (lambda f: f.update(head_sink=np.zeros(3, np.float32)), "head_sink: expected"),
    "norm alone": (
        lambda f: f.update(q_norm_weight=np.ones(16, np.float32)),
        "q_norm_weight and k_norm_weight",
    ),
    "norm size": (
        lambda f: f.update(
            q_norm_weight=np.ones(16, np.float32), k_norm_weight=np.ones(8, np.float32)
        ),
        "k_norm_weight: expected",
    ),
}

SPANS: dict[str, tuple[tuple[int, int], str]] = {
    "ends before it begins": ((4, 3), r"attend_span: entry 5 is \(4, 3\)"),
    "begins after its token": ((3, 9), r"attend_span: entry 5 is \(3, 9\), .* position 2 "),
    "is empty after its token": ((3, 3), r"attend_span: entry 5 is \(3, 3\)"),
    "begins before its sequence": ((-1, 2), r"attend_span: entry 5 is \(-1, 2\)"),
}


def assert_rejected(feed: Feed, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        run_paged(feed, attributes)


@pytest.mark.parametrize("name", CHANGES)
def test_malformed_inputs_are_named(name: str) -> None:
    change, message = CHANGES[name]
    feed = batch()
    change(feed)
    assert_rejected(feed, SHAPE.attributes, message)


@pytest.mark.parametrize("name", SPANS)
def test_malformed_spans_are_named(name: str) -> None:
    feed = batch()
    feed["attend_span"] = image_spans(feed)
    feed["attend_span"][5], message = SPANS[name]
    assert_rejected(feed, SHAPE.attributes, message)


def test_every_token_needs_a_span() -> None:
    feed = batch()
    for spans in (np.zeros((12, 2), np.int32), np.zeros(26, np.int32), np.zeros((13, 3), np.int32)):
        feed["attend_span"] = spans
        assert_rejected(feed, SHAPE.attributes, r"attend_span: expected \[13, 2\]")


def test_malformed_slopes_are_named() -> None:
    for slopes, message in (
        (np.zeros(3), r"alibi_slopes: expected \[4\], got \[3\]"),
        (np.zeros((4, 1)), r"alibi_slopes: expected \[4\], got \[4, 1\]"),
        (np.array([0, 1, np.inf, 0]), "alibi_slopes: entry 2 is inf, expected a finite number"),
        (np.array([0, np.nan, 1, 0]), "alibi_slopes: entry 1 is -?nan"),
    ):
        feed = batch() | {"alibi_slopes": slopes.astype(np.float32)}
        assert_rejected(feed, SHAPE.attributes, message)


def test_onnx_runtimes_own_operator_has_its_schema_and_no_more() -> None:
    feed = batch()
    feed["attend_span"] = image_spans(feed)
    with pytest.raises(InvalidGraph, match="input size 18 not in range"):
        session(
            "PagedAttention", "com.microsoft", EXTENDED_INPUTS, feed, SHAPE.attributes,
            {"output": TensorProto.FLOAT},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["cumulative decreases", "block too large", "slot below -1"])
def test_a_rejected_call_writes_nothing(name: str) -> None:
    feed = batch()
    CHANGES[name][0](feed)
    paged = session(
        "PagedAttention", "com.microsoft", PAGED_INPUTS, feed, SHAPE.attributes,
        {"output": TensorProto.FLOAT},
    )  # fmt: skip
    values = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in feed.items()}
    binding = paged.io_binding()
    for input_name, value in values.items():
        binding.bind_ortvalue_input(input_name, value)
    binding.bind_output("output")
    with pytest.raises(ERRORS):
        paged.run_with_iobinding(binding)
    for cache in ("key_cache", "value_cache"):
        np.testing.assert_array_equal(values[cache].numpy(), feed[cache])


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
@pytest.mark.parametrize("value", [np.ones(2), np.full(1, -1.0), np.full(1, np.nan)])
def test_scales_must_fit_their_granularity(scale: str, value: Array) -> None:
    feed = quantized(batch(), False) | {scale: value.astype(np.float32)}
    assert_rejected(feed, SHAPE.attributes | quantized_attributes(False), f"{scale}: ")


def test_per_channel_scales_need_every_channel() -> None:
    feed = quantized(batch(), False)
    assert_rejected(
        feed, SHAPE.attributes | quantized_attributes(True), r"k_scale: expected \[2, 1, 16\]"
    )


def test_int8_caches_need_scales_and_float_caches_take_none() -> None:
    feed = quantized(batch(), False)
    del feed["v_scale"]
    assert_rejected(feed, SHAPE.attributes | quantized_attributes(False), "v_scale: required")
    assert_rejected(feed, SHAPE.attributes, "k_quant_type: PER_TENSOR or PER_CHANNEL is required")
    assert_rejected(
        batch(), SHAPE.attributes | quantized_attributes(False), "k_quant_type: must be NONE"
    )


def test_rotary_tables_must_cover_every_position() -> None:
    attributes = SHAPE.attributes | {"do_rotary": 1}
    assert_rejected(batch(), attributes, "cos_cache and sin_cache: required")
    short = np.ones((20, 8), np.float32)
    assert_rejected(
        batch() | {"cos_cache": short, "sin_cache": short},
        attributes,
        "cos_cache: has 20 positions, but a sequence has 21 tokens",
    )
    wide = np.ones((40, 9), np.float32)
    assert_rejected(batch() | {"cos_cache": wide, "sin_cache": wide}, attributes, "cos_cache: ")


@pytest.mark.parametrize("kind", [np.uint8, np.float16])
def test_other_cache_types_are_named(kind: Any) -> None:
    feed = batch()
    for name in ("key_cache", "value_cache"):
        feed[name] = np.zeros(feed[name].shape, kind)
    assert_rejected(feed, SHAPE.attributes, "key_cache: the CPU kernel supports float32 and int8")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_cache_layout": "LATENT"}, "kv_cache_layout: .*not LATENT"),
        ({"k_cache_dtype": "int4"}, "k_cache_dtype: .*not int4"),
        ({"v_cache_dtype": "float8e4m3fn"}, "v_cache_dtype: .*not float8e4m3fn"),
        ({"v_head_size": 8}, "v_head_size"),
        ({"num_heads": 5}, "num_heads: 5 is not a positive multiple"),
        ({"k_quant_type": "PER_ROW"}, "k_quant_type: expected .*got PER_ROW"),
        ({"qk_norm_epsilon": 0.0}, "qk_norm_epsilon"),
        ({"softcap": -1.0}, "softcap"),
        ({"rotary_offset": 4}, "rotary_offset"),
    ],
)
def test_unsupported_attributes_are_named(extra: dict[str, Any], message: str) -> None:
    assert_rejected(batch(), SHAPE.attributes | extra, message)
