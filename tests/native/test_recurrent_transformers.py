"""Recurrent layers equal the functions that transformers' models call, over prompts and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from tests.native.attention_reference import Array
from tests.native.recurrent_reference import (
    LAYERS,
    Feed,
    Layer,
    assert_close,
    random_batch,
    run,
)

# Chunked forms sum in another order, in float32 as well.
TOLERANCE = 3e-5

every_length = pytest.mark.parametrize(("past", "new"), [(0, 100), (0, 2), (7, 1)])


def random_sequence(layer: Layer, past: int, new: int) -> tuple[Feed, Array, dict[str, Any]]:
    """A batch of one sequence in slot 1, its pool, and the inputs as tensors."""
    feed, pool = random_batch(layer, [past], [new])
    return feed, pool, {name: torch.from_numpy(array.copy()) for name, array in feed.items()}


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[tokens, count * size] as [1, tokens, count, size]."""
    return x.unflatten(1, (count, -1))[None]


def before(pool: Array, past: int) -> torch.Tensor | None:
    return torch.from_numpy(pool[1:2].copy()) if past else None


def assert_equals(
    layer: Layer, feed: Feed, pool: Array, output: torch.Tensor, state: torch.Tensor
) -> None:
    got, after = run(layer, feed, pool)
    assert_close(got, output.numpy().reshape(got.shape), TOLERANCE)
    assert_close(after[1], state[0].numpy(), TOLERANCE)


@pytest.mark.parametrize("model", [modeling_qwen3_next, modeling_lfm2, modeling_mamba2])
@pytest.mark.parametrize("name", ["conv", "short conv"])
@every_length
def test_convolutions(model: Any, name: str, past: int, new: int) -> None:
    layer = LAYERS[name]
    feed, pool, t = random_sequence(layer, past, new)
    weight, bias = t["weight"], t.get("bias")
    activation = layer.attributes.get("activation")
    x = t["x"].T[None]
    if past:  # transformers keeps one token more than the convolution reads
        state = torch.cat([torch.zeros(1, len(weight), 1), torch.from_numpy(pool[1:2])], dim=2)
        output = model.causal_conv1d_update(x, state, weight, bias, activation)
    else:
        state = torch.nn.functional.pad(x, (weight.shape[1], 0))[:, :, -weight.shape[1] :]
        output = model.causal_conv1d_fn(x, weight, bias, activation=activation)
    assert_equals(layer, feed, pool, output[0].T, state[:, :, 1:])


@pytest.mark.parametrize(
    "function",
    [
        modeling_qwen3_next.torch_recurrent_gated_delta_rule,
        modeling_qwen3_next.torch_chunk_gated_delta_rule,
        modeling_qwen3_5.torch_recurrent_gated_delta_rule,
        modeling_qwen3_5.torch_chunk_gated_delta_rule,
    ],
)
@pytest.mark.parametrize("name", ["delta", "delta of whole vectors"])
@every_length
def test_gated_delta_rules(function: Any, name: str, past: int, new: int) -> None:
    layer = LAYERS[name]
    feed, pool, t = random_sequence(layer, past, new)
    k_heads, v_heads = layer.attributes["k_heads"], layer.attributes["v_heads"]
    output, state = function(
        heads(t["query"], k_heads),
        heads(t["key"], k_heads),
        heads(t["value"], v_heads),
        g=t["decay"][None],
        beta=t["beta"][None],
        initial_state=before(pool, past),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_equals(layer, feed, pool, output, state)


@pytest.mark.parametrize(
    "function",
    [
        modeling_kimi_linear.recurrent_kimi_delta_attention,
        modeling_kimi_linear.chunk_kimi_delta_attention,
    ],
)
@every_length
def test_kimi_delta_attention(function: Any, past: int, new: int) -> None:
    layer = LAYERS["delta per channel"]
    feed, pool, t = random_sequence(layer, past, new)
    count = layer.attributes["v_heads"]
    output, state = function(
        *(heads(t[name], count) for name in ("query", "key", "value")),
        g=heads(t["decay"], count),
        beta=t["beta"][None],
        initial_state=before(pool, past),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_equals(layer, feed, pool, output, state)


@pytest.mark.parametrize("new", [1, 100])
def test_lightning_attention(new: int) -> None:
    layer = LAYERS["gated"]
    feed, pool, t = random_sequence(layer, 0, new)
    count, size, _ = layer.state
    config = MiniMaxConfig(
        hidden_size=count * size,
        num_attention_heads=count,
        num_key_value_heads=count,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=16,
    )
    module = MiniMaxLightningAttention(config, layer_idx=0)
    # Everything but the attention itself out of the way.
    module.act_fn = module.qkv_proj = module.norm = module.out_proj = torch.nn.Identity()
    module.output_gate = torch.nn.Linear(3 * count * size, count * size)
    torch.nn.init.zeros_(module.output_gate.weight)
    torch.nn.init.constant_(module.output_gate.bias, 100)  # open: its sigmoid is 1
    packed = torch.cat([heads(t[name], count) for name in ("query", "key", "value")], dim=-1)
    with torch.no_grad():
        output, state = module(packed.flatten(2), None, None)
    slope = module.slope_rate.flatten().numpy()
    feed["decay"] = np.tile(-slope, (new, 1)).astype(np.float32)
    assert_equals(layer, feed, pool, output, state)


def mamba_tensors(layer: Layer, t: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    count, _, state_size = layer.state
    groups = t["B"].shape[1] // state_size
    return heads(t["x"], count), t["dt"][None], heads(t["B"], groups), heads(t["C"], groups)


@pytest.mark.parametrize("model", [modeling_mamba2, modeling_bamba, modeling_nemotron_h])
@pytest.mark.parametrize("name", ["mamba2", "mamba2 of whole vectors", "mamba2 clamped"])
@every_length
def test_mamba2_over_chunks(model: Any, name: str, past: int, new: int) -> None:
    layer = LAYERS[name]
    feed, pool, t = random_sequence(layer, past, new)
    x, dt, b, c = mamba_tensors(layer, t)
    low, high = (layer.attributes.get(f"time_step_{n}") for n in ("min", "max"))
    output, state = model.mamba2_chunk_scan(
        x,
        dt,
        t["A"],
        b,
        c,
        chunk_size=32,
        D=t.get("D"),
        dt_bias=t.get("dt_bias"),
        initial_states=before(pool, past),
        dt_softplus=True,
        dt_limit=(low or 0.0, high or float("inf")),
        return_final_states=True,
    )
    assert_equals(layer, feed, pool, output, state)


@pytest.mark.parametrize("name", ["mamba2", "mamba2 of whole vectors"])
def test_mamba2_by_one_token(name: str) -> None:
    layer = LAYERS[name]
    feed, pool, t = random_sequence(layer, 9, 1)
    (x, dt, b, c), (_, size, state_size) = mamba_tensors(layer, t), layer.state
    state = torch.from_numpy(pool[1:2].copy())
    output = modeling_mamba2.mamba2_selective_state_update(
        state,
        x[:, 0],
        dt[:, 0, :, None].expand(-1, -1, size),
        t["A"][:, None, None].expand(-1, size, state_size),
        b[:, 0],
        c[:, 0],
        t["D"][:, None].expand(-1, size),
        dt_bias=t["dt_bias"][:, None].expand(-1, size),
        dt_softplus=True,
    )
    assert_equals(layer, feed, pool, output, state)


@pytest.mark.parametrize("model", [modeling_jamba, modeling_falcon_mamba])
def test_mamba_over_a_prompt(model: Any) -> None:
    layer = LAYERS["mamba"]
    feed, pool, t = random_sequence(layer, 0, 50)
    x, dt, b, c = (t[name].T[None] for name in ("x", "dt", "B", "C"))
    output, state = model.mamba_selective_scan(
        x,
        dt,
        t["A"],
        b,
        c,
        D=t["D"],
        delta_bias=t["dt_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    assert_equals(layer, feed, pool, output[0].T, state[:, :, None])


@pytest.mark.parametrize("model", [modeling_jamba, modeling_falcon_mamba])
def test_mamba_by_one_token(model: Any) -> None:
    layer = LAYERS["mamba"]
    feed, pool, t = random_sequence(layer, 9, 1)
    state = torch.from_numpy(pool[1:2, :, 0].copy())
    output = model.mamba_selective_state_update(
        state, t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["dt_bias"], dt_softplus=True
    )
    assert_equals(layer, feed, pool, output, state[:, :, None])
