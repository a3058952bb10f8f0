"""Malformed inputs of recurrent layers are named, and leave the states as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.native.recurrent_reference import (
    LAYERS,
    Feed,
    Layer,
    int32,
    random_batch,
    recurrent_session,
    run,
)

# A run with I/O binding reports a failed node as the builtin RuntimeError.
ERRORS = (Fail, InvalidArgument, RuntimeException, RuntimeError)
Change = Callable[[Feed], Any]

OPERATORS = ("conv", "delta", "mamba2")

SEQUENCES: dict[str, tuple[Feed, str]] = {
    "cumulative decreases": (
        {"cumulative_sequence_length": int32(0, 9, 8, 13)},
        "cumulative_sequence_length: decreases from 9 to 8 at 2",
    ),
    "cumulative ends early": (
        {"cumulative_sequence_length": int32(0, 3, 12, 12)},
        "cumulative_sequence_length: must end with the number of tokens 13, got 12",
    ),
    "cumulative starts late": (
        {"cumulative_sequence_length": int32(1, 3, 12, 13)},
        "cumulative_sequence_length: must start with 0, got 1",
    ),
    "cumulative empty": (
        {"cumulative_sequence_length": int32()},
        r"cumulative_sequence_length: expected \[sequences \+ 1\], got \[0\]",
    ),
    "past negative": ({"past_seqlens": int32(5, -1, 2)}, "past_seqlens: entry 1 is negative: -1"),
    "past of others": ({"past_seqlens": int32(5, 0)}, r"past_seqlens: expected \[3\], got \[2\]"),
    "slots of others": ({"state_slots": int32(5)}, r"state_slots: expected \[3\], got \[1\]"),
    "slot too large": (
        {"state_slots": int32(1, 3, 7)},
        "state_slots: entry 2 is 7, expected a slot below 7",
    ),
    "slot negative": ({"state_slots": int32(-1, 3, 5)}, "state_slots: entry 0 is -1"),
    "slot taken twice": (
        {"state_slots": int32(5, 3, 5)},
        "state_slots: expected a slot of its own for every sequence, got slot 5 more than once",
    ),
}


def batch(layer: Layer) -> tuple[Feed, Any]:
    return random_batch(layer, [5, 0, 20], [3, 9, 1])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences_that_do_not_fit_are_named_and_nothing_is_written(name: str, case: str) -> None:
    layer = LAYERS[name]
    feed, pool = batch(layer)
    change, message = SEQUENCES[case]
    feed |= change
    one = recurrent_session(layer, feed, pool)
    values = {
        n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in (feed | {"state": pool.copy()}).items()
    }
    binding = one.io_binding()
    for input_name, value in values.items():
        binding.bind_ortvalue_input(input_name, value)
    binding.bind_output("output")
    with pytest.raises(ERRORS, match=message):
        one.run_with_iobinding(binding)
    np.testing.assert_array_equal(values["state"].numpy(), pool)


def shaped(name: str, *shape: int) -> Change:
    return lambda feed: feed.update({name: np.zeros(shape, np.float32)})


SHAPES: list[tuple[str, Change, str]] = [
    ("conv", shaped("x", 13), r"x: expected \[tokens, channels\], got \[13\]"),
    ("conv", shaped("weight", 299, 4), r"weight: expected \[300, kernel\] .*, got \[299, 4\]"),
    ("conv", shaped("weight", 300, 1), r"weight: .* kernel of at least 2, got \[300, 1\]"),
    ("conv", shaped("bias", 1), r"bias: expected \[300\], got \[1\]"),
    ("conv", shaped("weight", 300, 3), r"state: expected \[slots, 300, 2\], got \[7, 300, 3\]"),
    ("delta", shaped("query", 13, 47), r"query: expected \[tokens, 48\], got \[13, 47\]"),
    ("delta", shaped("key", 12, 48), r"key: expected \[13, 48\], got \[12, 48\]"),
    ("delta", shaped("value", 13, 48), r"value: expected \[13, 288\], got \[13, 48\]"),
    ("delta", shaped("decay", 13, 5), r"decay: expected \[13, 4\] or \[13, 96\], got \[13, 5\]"),
    ("delta", shaped("beta", 13, 1), r"beta: expected \[13, 4\], got \[13, 1\]"),
    ("mamba2", shaped("x", 13, 31), r"x: expected \[tokens, 30\], got \[13, 31\]"),
    ("mamba2", shaped("dt", 13, 5), r"dt: expected \[13, 6\], got \[13, 5\]"),
    ("mamba2", shaped("A", 5), r"A: expected \[6\], got \[5\]"),
    ("mamba2", shaped("A", 6, 23), r"A: expected \[6, 24\], got \[6, 23\]"),
    ("mamba2", shaped("B", 13, 25), r"B: expected \[13, groups \* 24\] .* 6 heads, got \[13, 25\]"),
    ("mamba2", shaped("B", 13, 96), r"B: expected .* divide 6 heads, got \[13, 96\]"),
    ("mamba2", shaped("C", 13, 24), r"C: expected \[13, 48\], got \[13, 24\]"),
    ("mamba2", shaped("D", 1), r"D: expected \[6\], got \[1\]"),
    ("mamba2", shaped("dt_bias", 30), r"dt_bias: expected \[6\], got \[30\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), SHAPES, ids=[m for _, _, m in SHAPES])
def test_shapes_that_do_not_fit_are_named(name: str, change: Change, message: str) -> None:
    feed, pool = batch(LAYERS[name])
    change(feed)
    with pytest.raises(ERRORS, match=message):
        run(LAYERS[name], feed, pool)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv", r"state: expected \[slots, 300, 3\], got \[7\]"),
        ("delta", r"state: expected \[slots, 4, k_size, v_size\], got \[7\]"),
        ("mamba2", r"state: expected \[slots, heads, head_size, state_size\], got \[7\]"),
    ],
)
def test_a_pool_of_another_rank_is_named(name: str, message: str) -> None:
    feed, _ = batch(LAYERS[name])
    with pytest.raises(ERRORS, match=message):
        run(LAYERS[name], feed, np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("conv", {"activation": "relu"}, 'activation: expected "" or silu, got relu'),
        ("delta", {"v_heads": 5}, "v_heads: 5 is not a positive multiple of k_heads 2"),
        ("delta", {"k_heads": 0}, "v_heads: 4 is not a positive multiple of k_heads 0"),
        ("delta", {"scale": np.inf}, "scale: expected a finite number, got inf"),
        ("delta", {"l2norm_epsilon": -1.0}, "l2norm_epsilon: expected 0 or a positive number"),
        ("mamba2", {"time_step_min": 2.0, "time_step_max": 1.0}, "time_step_min: expected at most"),
        ("mamba2", {"time_step_max": np.nan}, "time_step_min: expected at most"),
    ],
)
def test_attributes_that_make_no_sense_are_named(
    name: str, attributes: dict[str, Any], message: str
) -> None:
    layer = LAYERS[name]
    feed, pool = batch(layer)
    changed = Layer(
        layer.op, layer.state, layer.feed, layer.reference, layer.attributes | attributes
    )
    with pytest.raises(ERRORS, match=message):
        recurrent_session(changed, feed, pool)
