"""LinearW8A8 equals the exact integer reference, for every kernel, shape and epilogue."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmcompile.quantize.packing import interleave_gate_up
from tests.native.linear_reference import (
    ACTIVATION_RTOL,
    ACTIVATIONS,
    ISAS,
    Linear,
    activate,
    assert_matches,
    random_linear,
)

ROWS = (0, 1, 2, 15, 16, 17, 130)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (37, 100), (96, 576), (200, 7), (1, 1), (48, 320)])
def test_any_number_of_rows_and_ragged_sizes(isa: str, n: int, k: int) -> None:
    rng = np.random.default_rng(n * k)
    layer = random_linear(rng, n, k)
    session = layer.session(np.zeros((1, k), np.float32), isa=isa)
    for rows in ROWS:
        x = rng.normal(size=(rows, k)).astype(np.float32)
        assert_matches(layer, x, None, session.run(None, {"x": x})[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add_residual", [False, True])
def test_epilogues(isa: str, activation: str, bias: bool, add_residual: bool) -> None:
    rng = np.random.default_rng(7)
    n = 96 if activation == "swiglu" else 87
    layer = random_linear(rng, n, 130, activation, bias)
    layer.scale *= np.repeat([0.01, 1, 30], n // 3).astype(np.float32)
    x = rng.normal(size=(19, 130)).astype(np.float32)
    residual = rng.normal(size=(19, layer.width)).astype(np.float32) if add_residual else None
    assert_matches(layer, x, residual, layer.run(x, residual, isa))


@pytest.mark.parametrize("isa", ISAS)
def test_input_scale_multiplies_each_channel_before_rounding(isa: str) -> None:
    rng = np.random.default_rng(8)
    layer = random_linear(rng, 40, 130)
    layer.input_scale = rng.uniform(0.01, 3, 130).astype(np.float32)
    x = rng.normal(size=(19, 130)).astype(np.float32)
    assert_matches(layer, x, None, layer.run(x, None, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [576, 130, 7])
def test_rows_are_normalized_by_their_root_mean_square(isa: str, k: int) -> None:
    rng = np.random.default_rng(9)
    layer = random_linear(rng, 40, k, "silu")
    layer.rms_epsilon = 1e-5
    layer.input_scale = rng.uniform(0.01, 3, k).astype(np.float32)
    x = (rng.normal(size=(19, k)) * 10.0 ** rng.uniform(-3, 3, (19, 1))).astype(np.float32)
    x[3] = 0
    residual = rng.normal(size=(19, 40)).astype(np.float32)
    assert_matches(layer, x, residual, layer.run(x, residual, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_extreme_integers_do_not_saturate(isa: str, rows: int) -> None:
    weight = np.concatenate([np.full((20, 640), v, np.int8) for v in (-128, 127)])
    layer = Linear(weight, np.ones(40, np.float32), static=(1.0, 0))
    x = np.full((rows, 640), 255, np.float32)
    expected = np.broadcast_to(np.repeat([-128, 127], 20) * 255.0 * 640, (rows, 40))
    np.testing.assert_array_equal(layer.run(x, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 40])
def test_integers_are_exact_in_the_widest_layer(isa: str, rows: int) -> None:
    rng = np.random.default_rng(3)
    layer = Linear(
        rng.integers(-128, 128, (33, 65536), dtype=np.int8),
        np.ones(33, np.float32),
        static=(1.0, 9),
    )
    x = rng.integers(-9, 247, (rows, 65536)).astype(np.float32)
    expected = x.astype(np.float64) @ layer.weight.T.astype(np.float64)
    np.testing.assert_array_equal(layer.run(x, isa=isa), expected.astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_the_other_rows_nor_on_threads(isa: str) -> None:
    rng = np.random.default_rng(5)
    layer = random_linear(rng, 200, 192, "gelu")
    x = rng.normal(size=(130, 192)).astype(np.float32)
    session = layer.session(x, isa=isa)
    together = session.run(None, {"x": x})[0]
    for rows in (1, 2, 4, 5, 7, 12, 15, 16, 17, 33, 100):
        start = int(rng.integers(0, 131 - rows))
        some = session.run(None, {"x": x[start : start + rows]})[0]
        np.testing.assert_array_equal(some, together[start : start + rows])
    np.testing.assert_array_equal(layer.run(x, isa=isa, threads=1), together)


def test_emulated_tiles_give_the_bits_of_the_portable_kernel() -> None:
    rng = np.random.default_rng(6)
    layer = random_linear(rng, 160, 300, "swiglu")
    x = rng.normal(size=(77, 300)).astype(np.float32)
    np.testing.assert_array_equal(layer.run(x, isa="amx_emulated"), layer.run(x, isa="portable"))


def test_long_prefills_are_processed_in_chunks() -> None:
    rng = np.random.default_rng(8)
    layer = random_linear(rng, 32, 8192)
    x = rng.normal(size=(1100, 8192)).astype(np.float32)
    residual = rng.normal(size=(1100, 32)).astype(np.float32)
    assert_matches(layer, x, residual, layer.run(x, residual))


def test_leading_dimensions_are_kept() -> None:
    rng = np.random.default_rng(9)
    layer = random_linear(rng, 64, 70, "swiglu")
    x = rng.normal(size=(2, 3, 5, 70)).astype(np.float32)
    residual = rng.normal(size=(2, 3, 5, 32)).astype(np.float32)
    assert_matches(layer, x, residual, layer.run(x, residual))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_layers(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    n = (
        data.draw(st.integers(1, 5)) * 32
        if activation == "swiglu"
        else data.draw(st.integers(1, 150))
    )
    layer = random_linear(
        rng, n, data.draw(st.integers(1, 300)), activation, data.draw(st.booleans())
    )
    if data.draw(st.booleans()):
        layer.static = (
            data.draw(st.floats(2.0**-10, 1.0, width=32)),
            data.draw(st.integers(0, 255)),
        )
    rows = data.draw(st.integers(0, 70))
    spread = 10.0 ** rng.uniform(-3, 3, (rows, 1))
    x = (rng.normal(size=(rows, layer.weight.shape[1])) * spread).astype(np.float32)
    residual = None
    if data.draw(st.booleans()):
        residual = rng.normal(size=(rows, layer.width)).astype(np.float32)
    assert_matches(layer, x, residual, layer.run(x, residual, data.draw(st.sampled_from(ISAS))))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("span", [0.01, 10.0, 1000.0])
def test_activations_are_accurate_relative_to_their_argument(
    isa: str, activation: str, span: float
) -> None:
    argument = np.linspace(-span, span, 4096, dtype=np.float32)
    if activation == "swiglu":
        argument = interleave_gate_up(argument, np.ones_like(argument))
    n = len(argument)
    layer = Linear(np.zeros((n, 1), np.int8), np.ones(n, np.float32), argument, activation)
    y = layer.run(np.zeros((1, 1), np.float32), isa=isa)
    expected = activate(argument[None].astype(np.float64), activation)
    gate = argument.reshape(-1, 2, 16)[:, 0].ravel() if activation == "swiglu" else argument
    assert (np.abs(y - expected) <= ACTIVATION_RTOL * np.abs(gate)).all()


def test_concurrent_runs_of_one_session_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(10)
    layer = random_linear(rng, 200, 300)
    x = rng.normal(size=(33, 300)).astype(np.float32)
    session = layer.session(x)
    expected = session.run(None, {"x": x})[0]

    def mismatches(_: int) -> int:
        runs = ((rows, session.run(None, {"x": x[:rows]})[0]) for rows in range(1, 34))
        return sum(not np.array_equal(y, expected[:rows]) for rows, y in runs)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(mismatches, range(12))) == 0
