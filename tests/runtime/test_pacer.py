"""How much prefill and encoding fits beside decoding, by what steps have taken."""

from __future__ import annotations

import pytest

from glmcompile.runtime.pacer import (
    COMFORT,
    FULL_PREFILL,
    LONGEST_STEP,
    MIN_PREFILL,
    STRETCH,
    Pacer,
)

DECODE = 0.05  # seconds of a step that only decodes, well above what nobody notices


def settled(cost: float, decode: float = DECODE) -> Pacer:
    """A pacer that has seen many steps of a model whose prefill adds `cost` seconds a token."""
    pacer = Pacer()
    for _ in range(10):
        pacer.observe(4, 0, decode)
    for _ in range(60):
        tokens = pacer.prefill_tokens(decoding=True) or 0
        pacer.observe(4, tokens, decode + cost * tokens)
    return pacer


@pytest.mark.parametrize("cost", [1e-4, 1e-3, 5e-3])
def test_prefill_beside_decoding_takes_as_long_as_decoding_does(cost: float) -> None:
    tokens = settled(cost).prefill_tokens(decoding=True)
    assert tokens is not None
    assert DECODE + tokens * cost == pytest.approx(STRETCH * DECODE, rel=0.15)


def test_prefill_goes_on_however_dear_it_is() -> None:
    assert settled(1.0).prefill_tokens(decoding=True) == MIN_PREFILL


def test_tokens_that_ride_along_for_nothing_become_more_step_by_step() -> None:
    pacer = Pacer()
    pacer.observe(4, 0, DECODE)
    allowed = []
    for _ in range(5):
        allowed.append(pacer.prefill_tokens(decoding=True) or 0)
        pacer.observe(4, allowed[-1], DECODE)
    assert allowed == [16, 32, 64, 128, 256]


def test_fast_decoding_may_be_slowed_to_what_nobody_notices() -> None:
    tokens = settled(1e-4, decode=0.001).prefill_tokens(decoding=True)
    assert tokens is not None
    assert 0.001 + tokens * 1e-4 == pytest.approx(COMFORT, rel=0.15)


def test_nothing_is_prefilled_until_it_is_known_what_decoding_alone_takes() -> None:
    pacer = Pacer()
    assert pacer.prefill_tokens(decoding=True) == 0
    assert pacer.prefill_tokens(decoding=False) is None


def test_decoding_alone_is_looked_at_again_while_prefills_go_on() -> None:
    pacer = Pacer()
    pacer.observe(4, 0, DECODE)
    allowed = []
    for _ in range(200):
        tokens = pacer.prefill_tokens(decoding=True)
        assert tokens is not None
        allowed.append(tokens)
        pacer.observe(4, tokens, 2 * DECODE if tokens else DECODE)
    assert allowed.count(0) == 3
    assert allowed[0] > 0


def test_a_step_that_only_prefills_is_bounded_in_time() -> None:
    pacer = Pacer()
    for _ in range(20):
        pacer.observe(0, 512, 512 * 0.001)
    tokens = pacer.prefill_tokens(decoding=False)
    assert tokens is not None
    assert tokens * 0.001 == pytest.approx(LONGEST_STEP, rel=0.05)


def test_a_large_model_prefills_enough_to_be_worth_reading_its_weights() -> None:
    """0.3 s to read them, and 17 ms a token: without a least number, steps shrink to a few."""
    pacer = Pacer()
    tokens = 2048
    for _ in range(50):
        pacer.observe(0, tokens, 0.3 + tokens * 0.017)
        tokens = pacer.prefill_tokens(decoding=False) or 0
    assert tokens == FULL_PREFILL


def test_the_encoder_gets_what_a_step_leaves_of_the_gap() -> None:
    pacer = settled(1e-3)
    assert DECODE + pacer.pause(DECODE, decoding=True) == pytest.approx(STRETCH * DECODE, rel=0.01)
    # It is never starved, not even beside a step that took all of it.
    assert pacer.pause(3 * DECODE, decoding=True) > 0
    assert pacer.pause(DECODE, decoding=False) == DECODE / 4
