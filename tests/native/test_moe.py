"""MoE equals its float64 reference, for every kernel, layout, shape and activation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.moe_reference import (
    GATINGS,
    HALVES,
    ISAS,
    Gating,
    assert_matches,
    random_experts,
    route,
    some_tokens,
)

LAYOUTS = [
    {"interleaved": interleaved, "transposed": transposed}
    for interleaved in (False, True)
    for transposed in (False, True)
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("width", "inner"), [(64, 96), (100, 37), (7, 1), (1, 5), (1100, 9)])
def test_any_number_of_tokens_and_ragged_sizes(
    isa: str, transposed: bool, width: int, inner: int
) -> None:
    rng = np.random.default_rng(width * inner)
    experts = random_experts(rng, 5, width, inner, transposed=transposed)
    session = experts.session(isa)
    for tokens in (0, 1, 2, 7, 40, 130):
        inputs = route(rng, tokens, width, 5, 2)
        assert_matches(experts, inputs, session.run(None, inputs)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_biases(isa: str, gating: Gating, bias: bool) -> None:
    rng = np.random.default_rng(1)
    experts = random_experts(rng, 4, 70, 45, gating, bias)
    inputs = route(rng, 19, 70, 4, 2)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 60])
def test_layouts_of_weights(isa: str, layout: dict[str, bool], tokens: int) -> None:
    rng = np.random.default_rng(2)
    gating = Gating("clamped_swiglu", alpha=1.702, limit=7.0)
    experts = random_experts(rng, 3, 90, 75, gating, bias=True, **layout)
    inputs = route(rng, tokens, 90, 3, 3)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("choices", range(9))
def test_any_number_of_choices(isa: str, choices: int) -> None:
    rng = np.random.default_rng(3)
    experts = random_experts(rng, 8, 65, 40)
    inputs = route(rng, 23, 65, 8, choices)
    assert_matches(experts, inputs, experts.run(inputs, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_tokens_and_one_that_gets_all(isa: str, transposed: bool) -> None:
    rng = np.random.default_rng(4)
    experts = random_experts(rng, 16, 130, 50, transposed=transposed)
    inputs = route(rng, 300, 130, 16, 2)
    inputs["top_k_index"][:] = [11, 3]
    inputs["top_k_index"][17] = [3, 3]  # twice the same is twice its result
    experts.up[[0, 15]] = np.nan
    y = experts.run(inputs, isa)
    experts.up[[0, 15]] = 0
    assert_matches(experts, inputs, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_does_not_depend_on_the_other_tokens_nor_on_threads(
    isa: str, layout: dict[str, bool]
) -> None:
    rng = np.random.default_rng(5)
    # Deep enough for the sums to be cut, wide enough for several tasks of a group.
    experts = random_experts(rng, 4, 1500, 300, bias=True, **layout)
    inputs = route(rng, 270, 1500, 4, 2)
    session = experts.session(isa)
    together = session.run(None, inputs)[0]
    for tokens in (1, 2, 5, 8, 13, 33, 100):
        start = int(rng.integers(0, 271 - tokens))
        which = slice(start, start + tokens)
        some = session.run(None, some_tokens(inputs, which))[0]
        np.testing.assert_array_equal(some, together[which])
    np.testing.assert_array_equal(experts.run(inputs, isa, threads=1), together)


def test_long_prefills_are_processed_in_chunks() -> None:
    rng = np.random.default_rng(6)
    experts = random_experts(rng, 8, 8192, 1)
    inputs = route(rng, 1000, 8192, 8, 8)
    session = experts.session()
    halves = [session.run(None, some_tokens(inputs, part))[0] for part in HALVES]
    np.testing.assert_array_equal(session.run(None, inputs)[0], np.concatenate(halves))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_experts(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    gating = data.draw(st.sampled_from(GATINGS))
    layout = data.draw(st.sampled_from(LAYOUTS if gating.gated else LAYOUTS[:2]))
    count, choices = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    width, inner = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    experts = random_experts(rng, count, width, inner, gating, data.draw(st.booleans()), **layout)
    inputs = route(rng, data.draw(st.integers(0, 70)), width, count, min(choices, count))
    inputs["x"] *= 10.0 ** rng.uniform(-3, 3, (len(inputs["x"]), 1)).astype(np.float32)
    assert_matches(experts, inputs, experts.run(inputs, data.draw(st.sampled_from(ISAS))))


def test_concurrent_runs_of_one_session_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(7)
    experts = random_experts(rng, 6, 200, 100)
    inputs = route(rng, 33, 200, 6, 2)
    session = experts.session()
    expected = session.run(None, inputs)[0]

    def mismatches(_: int) -> int:
        runs = (
            (tokens, session.run(None, some_tokens(inputs, slice(tokens)))[0])
            for tokens in range(1, 34)
        )
        return sum(not np.array_equal(y, expected[:tokens]) for tokens, y in runs)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(mismatches, range(12))) == 0
