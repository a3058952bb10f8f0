"""Recurrent layers over packed batches: float64 references, and what a result may not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from tests.native.attention_reference import ISAS, session
from tests.native.recurrent_reference import (
    INPUTS,
    LAYERS,
    assert_close,
    expected,
    int32,
    part,
    random_batch,
    run,
)

every_layer = pytest.mark.parametrize("name", LAYERS)
every_isa = pytest.mark.parametrize("isa", ISAS)


@every_isa
@every_layer
def test_a_mixed_batch_equals_the_reference(name: str, isa: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0, 70, 3, 0], [150, 1, 9, 2])
    output, after = run(layer, feed, pool, isa)
    wanted, wanted_pool = expected(layer, feed, pool)
    assert_close(output, wanted)
    assert_close(after, wanted_pool)
    np.testing.assert_array_equal(after[::2], pool[::2])  # slots of nobody


@every_isa
@every_layer
@pytest.mark.parametrize("chunks", [[1] * 5 + [35], [20, 20], [2, 1, 1, 36]], ids=str)
def test_chunks_give_what_the_whole_gives(name: str, isa: str, chunks: list[int]) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0], [40])
    whole, whole_pool = run(layer, feed, pool, isa)
    done = 0
    for size in chunks:
        tokens = slice(done, done + size)
        output, pool = run(layer, part(layer, feed, tokens, 0, done), pool, isa)
        np.testing.assert_array_equal(output, whole[tokens])
        done += size
    np.testing.assert_array_equal(pool, whole_pool)


@every_isa
@every_layer
def test_a_sequence_gives_the_same_alone_and_in_a_batch(name: str, isa: str) -> None:
    layer = LAYERS[name]
    past, new = [0, 5, 0, 33], [17, 1, 3, 8]
    feed, pool = random_batch(layer, past, new)
    together, pool_together = run(layer, feed, pool, isa)
    ends = feed["cumulative_sequence_length"]
    for i in range(len(new)):
        tokens = slice(ends[i], ends[i + 1])
        output, after = run(layer, part(layer, feed, tokens, i, past[i]), pool, isa)
        np.testing.assert_array_equal(output, together[tokens])
        np.testing.assert_array_equal(after[2 * i + 1], pool_together[2 * i + 1])


@every_layer
def test_threads_do_not_change_the_result(name: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0, 9], [60, 1])
    once, once_pool = run(layer, feed, pool, threads=1)
    for threads in (2, 5):
        output, after = run(layer, feed, pool, threads=threads)
        np.testing.assert_array_equal(output, once)
        np.testing.assert_array_equal(after, once_pool)


@every_isa
@every_layer
@pytest.mark.parametrize("tokens", [1, 4])
def test_without_a_past_what_a_slot_holds_is_not_seen(name: str, isa: str, tokens: int) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0], [tokens])
    used = pool.copy()
    used[1] = np.nan
    output, after = run(layer, feed, np.zeros_like(pool), isa)
    again, reused = run(layer, feed, used, isa)
    np.testing.assert_array_equal(again, output)
    np.testing.assert_array_equal(reused[1], after[1])


@every_layer
def test_a_sequence_without_tokens_takes_no_part(name: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [4, 0], [3, 2])
    output, after = run(layer, feed, pool)
    ends = feed["cumulative_sequence_length"]
    idle = feed | {
        "cumulative_sequence_length": int32(0, *ends[:2], ends[1], ends[2]),
        "state_slots": int32(-1, 1, 1, 3),
        "past_seqlens": int32(0, 4, 0, 0),
    }
    again, after_idle = run(layer, idle, pool)
    np.testing.assert_array_equal(again, output)
    np.testing.assert_array_equal(after_idle, after)


@every_layer
def test_no_tokens_give_no_rows(name: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [], [])
    output, after = run(layer, feed, pool)
    assert output.shape[0] == 0
    np.testing.assert_array_equal(after, pool)


@every_layer
def test_the_pool_is_an_output_for_who_asks(name: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0, 6], [5, 1])
    output, after = run(layer, feed, pool)
    outputs = {"output": TensorProto.FLOAT, "state_out": TensorProto.FLOAT}
    inputs = feed | {"state": pool.copy()}
    both = session(
        layer.op, "com.glmcompile", INPUTS[layer.op], inputs, layer.attributes, outputs
    ).run(None, inputs)
    np.testing.assert_array_equal(both[0], output)
    np.testing.assert_array_equal(both[1], after)
