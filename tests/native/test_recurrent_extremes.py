"""Decays and steps at the ends of their ranges: states that stay, vanish or grow by very little."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.attention_reference import ISAS
from tests.native.recurrent_reference import LAYERS, expected, random_batch, run, silu

every_isa = pytest.mark.parametrize("isa", ISAS)


@every_isa
@pytest.mark.parametrize("name", ["delta", "delta per channel", "delta of whole vectors"])
def test_without_decay_and_updates_a_state_stays_as_it_is(name: str, isa: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [1], [100])
    feed["decay"][:], feed["beta"][:] = 0, 0
    _, after = run(layer, feed, pool, isa)
    np.testing.assert_array_equal(after, pool)


@every_isa
@pytest.mark.parametrize("name", ["delta", "gated", "delta per channel"])
def test_a_decay_to_nothing_forgets_all(name: str, isa: str) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [1], [3])
    feed["decay"][0] = -np.inf
    output, after = run(layer, feed, pool, isa)
    fresh, fresh_pool = run(layer, feed, np.zeros_like(pool), isa)
    np.testing.assert_array_equal(output, fresh)
    np.testing.assert_array_equal(after[1], fresh_pool[1])


@every_isa
@pytest.mark.parametrize("name", ["mamba2", "mamba"])
@pytest.mark.parametrize("dt", [-60.0, -15.0, 0.0, 15.0, 60.0])
def test_steps_of_any_size(name: str, isa: str, dt: float) -> None:
    layer = LAYERS[name]
    feed, pool = random_batch(layer, [0], [1])
    feed["dt"][:], feed["dt_bias"][:], feed["D"][:] = dt, 0, 0
    _, after = run(layer, feed, pool, isa)
    _, wanted = expected(layer, feed, pool)
    np.testing.assert_allclose(after[1], wanted[1], rtol=1e-5)


@every_isa
def test_what_is_no_number_stays_so(isa: str) -> None:
    for name, where in (("delta", "decay"), ("mamba2", "dt"), ("mamba", "dt"), ("conv", "x")):
        layer = LAYERS[name]
        feed, pool = random_batch(layer, [1], [2])
        feed[where][0] = np.nan
        output, _ = run(layer, feed, pool, isa)
        assert np.isnan(output).all(), name


@every_isa
def test_silu_of_any_size(isa: str) -> None:
    layer = LAYERS["conv"]
    feed, pool = random_batch(layer, [0], [2])
    feed["weight"][:], feed["bias"][:] = [0, 0, 0, 1], 0
    feed["x"][0] = np.linspace(-80, 80, 300)
    feed["x"][1] = np.linspace(-1, 1, 300)
    output, _ = run(layer, feed, pool, isa)
    x = feed["x"].astype(np.float64)
    np.testing.assert_array_less(np.abs(output - silu(x)), 3e-7 * np.abs(x) + 1e-30)
