"""Recurrent layers: float64 references, random batches of them, and sessions of one node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from tests.native.attention_reference import Array, session

Feed = dict[str, Array]

SEQUENCES = ("state_slots", "cumulative_sequence_length", "past_seqlens")
INPUTS = {
    "PackedCausalConv": ("x", "weight", "bias", "state", *SEQUENCES),
    "PackedGatedDeltaRule": ("query", "key", "value", "decay", "beta", "state", *SEQUENCES),
    "PackedMamba2": ("x", "dt", "A", "B", "C", "D", "dt_bias", "state", *SEQUENCES),
}
# Those with a row for every token.
PER_TOKEN = {
    "PackedCausalConv": ("x",),
    "PackedGatedDeltaRule": ("query", "key", "value", "decay", "beta"),
    "PackedMamba2": ("x", "dt", "B", "C"),
}

# Largest difference from float64, relative to the largest value: float32 rounding of sums over
# channels and of states over hundreds of tokens.
TOLERANCE = 1e-5


def random_normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(x, 0)


def conv_reference(feed: Feed, state: Array, attributes: Mapping[str, Any]) -> tuple[Array, Array]:
    """The output of one sequence and its state [channels, kernel - 1] after it."""
    weight = feed["weight"]
    seen = np.concatenate([state, feed["x"].T], axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(seen, weight.shape[1], axis=1)
    output = np.einsum("ctk,ck->tc", windows, weight) + feed.get("bias", 0)
    return (
        silu(output) if attributes.get("activation") else output,
        seen[:, seen.shape[1] - state.shape[1] :],
    )


def delta_reference(feed: Feed, state: Array, attributes: Mapping[str, Any]) -> tuple[Array, Array]:
    """The same of the gated delta rule; its state is [v_heads, k_size, v_size]."""
    v_heads, k_size, v_size = state.shape
    k_heads, epsilon = attributes["k_heads"], attributes.get("l2norm_epsilon", 0)
    query, key = (
        np.repeat(feed[name].reshape(-1, k_heads, k_size), v_heads // k_heads, axis=1)
        for name in ("query", "key")
    )
    if epsilon:
        query, key = (
            x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + epsilon) for x in (query, key)
        )
    query = query * (attributes.get("scale") or k_size**-0.5)
    value = feed["value"].reshape(-1, v_heads, v_size)
    decay = np.exp(feed["decay"].reshape(len(query), v_heads, -1))
    output = np.zeros(value.shape)
    for t in range(len(query)):
        state = state * decay[t][..., None]
        change = value[t]
        if "beta" in feed:
            change = change - np.einsum("hkv,hk->hv", state, key[t])
            change = change * feed["beta"][t][:, None]
        state = state + key[t][..., None] * change[:, None, :]
        output[t] = np.einsum("hkv,hk->hv", state, query[t])
    return output.reshape(-1, v_heads * v_size), state


def mamba_reference(feed: Feed, state: Array, attributes: Mapping[str, Any]) -> tuple[Array, Array]:
    """The same of Mamba-2 and Mamba; the state is [heads, head_size, state_size]."""
    heads, head_size, state_size = state.shape
    x = feed["x"].reshape(-1, heads, head_size)
    dt = feed["dt"] + feed.get("dt_bias", 0)
    if attributes.get("dt_softplus", 1):
        dt = softplus(dt)
    low, high = attributes.get("time_step_min", 0.0), attributes.get("time_step_max", np.inf)
    dt = np.clip(dt, low, high)
    groups = feed["B"].shape[1] // state_size
    b, c = (
        np.repeat(feed[name].reshape(-1, groups, state_size), heads // groups, axis=1)
        for name in ("B", "C")
    )
    a = feed["A"].reshape(heads, -1)
    output = np.zeros(x.shape)
    for t in range(len(x)):
        state = state * np.exp(dt[t][:, None] * a)[:, None, :]
        state = state + (dt[t][:, None] * x[t])[..., None] * b[t][:, None, :]
        output[t] = np.einsum("hpn,hn->hp", state, c[t])
    output += x * feed["D"][:, None] if "D" in feed else 0
    return output.reshape(-1, heads * head_size), state


def conv_feed(
    rng: np.random.Generator, tokens: int, channels: int, kernel: int, bias: bool
) -> Feed:
    feed = {
        "x": random_normal(rng, tokens, channels),
        "weight": random_normal(rng, channels, kernel),
    }
    return feed | ({"bias": random_normal(rng, channels)} if bias else {})


def delta_feed(
    rng: np.random.Generator,
    tokens: int,
    k_heads: int,
    state: tuple[int, int, int],
    *,
    per_channel: bool = False,
    beta: bool = True,
) -> Feed:
    v_heads, k_size, v_size = state
    decays = v_heads * (k_size if per_channel else 1)
    feed = {
        "query": random_normal(rng, tokens, k_heads * k_size),
        # Of a norm near 1: much longer ones would let the state grow without end.
        "key": random_normal(rng, tokens, k_heads * k_size) * np.float32(k_size**-0.5),
        "value": random_normal(rng, tokens, v_heads * v_size),
        "decay": -rng.exponential(0.1, (tokens, decays)).astype(np.float32),
    }
    if not beta:
        return feed
    return feed | {"beta": rng.uniform(0, 1, (tokens, v_heads)).astype(np.float32)}


def mamba_feed(
    rng: np.random.Generator,
    tokens: int,
    groups: int,
    state: tuple[int, int, int],
    *,
    per_state: bool = False,
    optional: bool = True,
) -> Feed:
    heads, head_size, state_size = state
    feed = {
        "x": random_normal(rng, tokens, heads * head_size),
        "dt": random_normal(rng, tokens, heads) - 2,
        "A": -rng.uniform(0.1, 4, (heads, state_size) if per_state else heads).astype(np.float32),
        "B": random_normal(rng, tokens, groups * state_size),
        "C": random_normal(rng, tokens, groups * state_size),
    }
    if not optional:
        return feed
    return feed | {"D": random_normal(rng, heads), "dt_bias": random_normal(rng, heads)}


@dataclass(frozen=True)
class Layer:
    """An operator with its attributes.

    state: of one sequence; feed: its inputs but for state and sequences, for a number of tokens.
    """

    op: str
    state: tuple[int, ...]
    feed: Callable[[np.random.Generator, int], Feed]
    reference: Callable[[Feed, Array, Mapping[str, Any]], tuple[Array, Array]]
    attributes: dict[str, Any] = field(default_factory=dict)


def _conv(channels: int, kernel: int, bias: bool, **attributes: Any) -> Layer:
    return Layer(
        "PackedCausalConv",
        (channels, kernel - 1),
        lambda rng, tokens: conv_feed(rng, tokens, channels, kernel, bias),
        conv_reference,
        attributes,
    )


def _delta(
    k_heads: int,
    state: tuple[int, int, int],
    *,
    per_channel: bool = False,
    beta: bool = True,
    **attributes: Any,
) -> Layer:
    return Layer(
        "PackedGatedDeltaRule",
        state,
        lambda rng, tokens: delta_feed(
            rng, tokens, k_heads, state, per_channel=per_channel, beta=beta
        ),
        delta_reference,
        {"k_heads": k_heads, "v_heads": state[0]} | attributes,
    )


def _mamba(
    groups: int,
    state: tuple[int, int, int],
    *,
    per_state: bool = False,
    optional: bool = True,
    **attributes: Any,
) -> Layer:
    return Layer(
        "PackedMamba2",
        state,
        lambda rng, tokens: mamba_feed(
            rng, tokens, groups, state, per_state=per_state, optional=optional
        ),
        mamba_reference,
        attributes,
    )


# Sizes that are no multiples of a vector or of what a task takes, beside such that are.
LAYERS: dict[str, Layer] = {
    "conv": _conv(300, 4, bias=True, activation="silu"),
    "short conv": _conv(64, 3, bias=False),
    "conv of 2": _conv(7, 2, bias=True),
    "delta": _delta(2, (4, 24, 72), l2norm_epsilon=1e-6),
    "delta of whole vectors": _delta(2, (2, 128, 128), l2norm_epsilon=1e-6),
    "delta as they are": _delta(1, (3, 7, 5), scale=0.05),
    "delta per channel": _delta(3, (3, 16, 100), per_channel=True, l2norm_epsilon=1e-6),
    "gated": _delta(2, (2, 32, 32), beta=False, scale=1.0),
    "mamba2": _mamba(2, (6, 5, 24)),
    "mamba2 of whole vectors": _mamba(1, (4, 64, 128)),
    "mamba2 clamped": _mamba(3, (3, 8, 16), optional=False, time_step_min=0.1, time_step_max=0.2),
    "mamba2 of given steps": _mamba(1, (2, 4, 8), dt_softplus=0, time_step_min=0.05),
    "mamba": _mamba(1, (600, 1, 16), per_state=True),
}


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


def random_batch(
    layer: Layer, past: Sequence[int], new: Sequence[int], seed: int = 0
) -> tuple[Feed, Array]:
    """Inputs of sequences in slots 1, 3, 5, ... of a random pool, and that pool."""
    rng = np.random.default_rng(seed)
    feed = layer.feed(rng, sum(new))
    pool = random_normal(rng, 2 * len(new) + 1, *layer.state)
    feed |= {
        "state_slots": int32(*range(1, 2 * len(new), 2)),
        "cumulative_sequence_length": np.cumsum([0, *new], dtype=np.int32),
        "past_seqlens": int32(*past),
    }
    return feed, pool


def part(layer: Layer, feed: Feed, tokens: slice, sequence: int, past: int) -> Feed:
    """The tokens of one sequence in a call of their own."""
    rows = {name: feed[name][tokens] for name in PER_TOKEN[layer.op] if name in feed}
    return (
        feed
        | rows
        | {
            "state_slots": feed["state_slots"][sequence : sequence + 1],
            "cumulative_sequence_length": int32(0, tokens.stop - tokens.start),
            "past_seqlens": int32(past),
        }
    )


def recurrent_session(
    layer: Layer, feed: Feed, pool: Array, isa: str = "", threads: int = 2
) -> ort.InferenceSession:
    return session(
        layer.op,
        "com.glmcompile",
        INPUTS[layer.op],
        feed | {"state": pool},
        layer.attributes,
        {"output": TensorProto.FLOAT},
        isa,
        threads,
    )


def run(
    layer: Layer, feed: Feed, pool: Array, isa: str = "", threads: int = 2
) -> tuple[Array, Array]:
    """The output, and a pool as it is after the call; `pool` itself stays as it is."""
    one = recurrent_session(layer, feed, pool, isa, threads)
    return run_session(one, feed, pool)


def run_session(one: ort.InferenceSession, feed: Feed, pool: Array) -> tuple[Array, Array]:
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in (feed | {"state": pool.copy()}).items()
    }
    binding = one.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    one.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0], values["state"].numpy().copy()


def expected(layer: Layer, feed: Feed, pool: Array) -> tuple[Array, Array]:
    """What `run` shall give, in float64."""
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in feed.items()}
    pool = pool.astype(np.float64)
    outputs, ends = [], feed["cumulative_sequence_length"]
    for i, (slot, past) in enumerate(zip(feed["state_slots"], feed["past_seqlens"], strict=True)):
        one = part(layer, wide, slice(ends[i], ends[i + 1]), i, past)
        output, pool[slot] = layer.reference(
            one, pool[slot] if past else np.zeros_like(pool[slot]), layer.attributes
        )
        outputs.append(output)
    return np.concatenate(outputs), pool


def assert_close(actual: Array, wanted: Array, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
