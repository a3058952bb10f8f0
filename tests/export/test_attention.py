"""The attention functions do what the operators do and refuse the rest by the module's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

from glmcompile.errors import UnsupportedArchitectureError
from glmcompile.export.attention import (
    PAGED_ATTENTION,
    VARLEN_ATTENTION,
    Mask,
    Tracing,
    paged_attention,
    tracing,
    varlen_attention,
)

TOKENS = 19


class TinyAttention(nn.Module):
    """Stands for the module that calls; errors name it."""


def heads(count: int, tokens: int = TOKENS, size: int = 16) -> torch.Tensor:
    return torch.zeros(1, count, tokens, size)


def configured(implementation: str = PAGED_ATTENTION, **fields: Any) -> Any:
    config = transformers.MistralConfig(hidden_size=64, num_attention_heads=4, **fields)
    config._attn_implementation_internal = implementation
    return config


def mask_of(create: str, *, implementation: str = PAGED_ATTENTION, **options: Any) -> Any:
    """What transformers' own function hands to attention for one packed sequence."""
    fields = {name: options.pop(name) for name in ("sliding_window",) if name in options}
    config = configured(implementation, **fields)
    config.attention_chunk_size = 8
    arguments = {"config": config, "inputs_embeds": torch.zeros(1, TOKENS, 64), **options}
    if create != "create_bidirectional_mask":
        arguments |= {"cache": None}
    return getattr(masking_utils, create)(**{"attention_mask": None, **arguments})


CAUSAL = "create_causal_mask"


def call(mask: Any, *, keys: int = TOKENS, value_size: int = 16, **arguments: Any) -> Tracing:
    """One call of the paged function: 4 heads, 2 of keys and values."""
    with tracing(Tracing()) as state:
        query, key, value = heads(4), heads(2, keys), heads(2, keys, value_size)
        output, weights = paged_attention(TinyAttention(), query, key, value, mask, **arguments)
    assert output.shape == (1, TOKENS, 4, value_size)
    assert weights is None
    return state


def test_a_call_is_recorded_with_its_heads() -> None:
    [found] = call(mask_of(CAUSAL), value_size=24).calls
    shape = found.shape
    assert (shape.heads, shape.kv_heads, shape.head_size, shape.value_size) == (4, 2, 16, 24)
    assert found.mask == Mask(causal=True)
    assert shape.window == 0
    assert not found.cross


@pytest.mark.parametrize("positions", [None, torch.arange(TOKENS)[None]], ids=["none", "given"])
def test_windows_are_read_from_transformers_masks(positions: torch.Tensor | None) -> None:
    create = "create_sliding_window_causal_mask"
    [found] = call(mask_of(create, sliding_window=7, position_ids=positions)).calls
    assert found.mask == Mask(causal=True, window=7)
    assert found.shape.window == 7


def test_blocks_whose_tokens_see_each_other_are_read() -> None:
    blocks = torch.full((1, TOKENS), -1)
    blocks[0, 4:9] = 0
    [found] = call(mask_of(CAUSAL, block_sequence_ids=blocks)).calls
    assert found.mask is not None
    assert (found.mask.causal, found.mask.spans) == (True, True)
    assert found.mask.blocks == tuple(blocks[0].tolist())


def odd_mask(batch: int, head: int, query: int, key: int) -> Any:
    return (query - key) % 2 == 0


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (lambda: None, "attention to later tokens"),
        (lambda: mask_of("create_bidirectional_mask"), "attention to later tokens"),
        (lambda: mask_of("create_chunked_causal_mask"), "the mask chunked_overlay"),
        (lambda: mask_of(CAUSAL, and_mask_function=odd_mask), "the mask odd_mask"),
        (lambda: torch.zeros(1, 1, TOKENS, TOKENS), "an attention mask of its own"),
    ],
    ids=["none", "bidirectional", "chunked", "unknown", "tensor"],
)
def test_other_masks_are_refused(mask: Any, what: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"^TinyAttention needs {what}"):
        call(mask())


def test_cross_attention_is_refused() -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"TinyAttention needs .*cross-attention"
    ):
        call(mask_of(CAUSAL), keys=5)


@pytest.mark.parametrize("function", [paged_attention, varlen_attention])
def test_unknown_arguments_are_refused(function: Any) -> None:
    three = heads(4), heads(4), heads(4)
    refused = r"^TinyAttention needs the attention argument position_bias"
    with (
        tracing(Tracing()),
        pytest.raises(UnsupportedArchitectureError, match=refused),
    ):
        function(TinyAttention(), *three, None, position_bias=torch.zeros(1))


def test_arguments_that_change_nothing_pass() -> None:
    call(
        mask_of(CAUSAL),
        dropout=0.0,
        sliding_window=None,
        position_bias=None,
        output_attentions=False,
        is_causal=True,
    )


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """Operator, inputs and attributes of every node that the block makes."""
    made: list[tuple[str, Any, dict[str, Any]]] = []
    symbolic = torch.onnx.ops.symbolic

    def recorded(operator: str, inputs: Any, attributes: Any = None, **others: Any) -> Any:
        made.append((operator, inputs, dict(attributes or {})))
        return symbolic(operator, inputs, attributes, **others)

    monkeypatch.setattr(torch.onnx.ops, "symbolic", recorded)
    return made


def test_window_softcap_and_scale_reach_the_node(nodes: list[Any]) -> None:
    create = "create_sliding_window_causal_mask"
    call(mask_of(create, sliding_window=7), softcap=30.0, scaling=0.5)
    call(mask_of(CAUSAL))
    assert [(operator, attributes) for operator, _, attributes in nodes] == [
        (
            "com.microsoft::PagedAttention",
            {
                "num_heads": 4,
                "kv_num_heads": 2,
                "scale": 0.5,
                "local_window_size": 7,
                "softcap": 30.0,
            },
        ),
        ("com.microsoft::PagedAttention", {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25}),
    ]


def test_caches_and_batch_come_before_sinks_and_spans(nodes: list[Any]) -> None:
    caches = [(torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)) for _ in range(2)]
    batch = tuple(torch.zeros(size, dtype=torch.int32) for size in (2, 1, 1))
    spans, sinks = torch.zeros(TOKENS, 2, dtype=torch.int32), torch.zeros(4)
    blocks = torch.zeros(1, TOKENS, dtype=torch.int64)
    three = heads(4), heads(2), heads(2)
    with tracing(Tracing(caches, batch, spans)):
        paged_attention(TinyAttention(), *three, mask_of(CAUSAL), s_aux=sinks)
        paged_attention(TinyAttention(), *three, mask_of(CAUSAL, block_sequence_ids=blocks))
    (plain, with_sinks, _), (extended, with_spans, _) = nodes
    assert (plain, extended) == ("com.microsoft::PagedAttention", "com.glmcompile::PagedAttention")
    for inputs, own in ((with_sinks, caches[0]), (with_spans, caches[1])):
        assert all(a is b for a, b in zip(inputs[3:8], (*own, *batch), strict=True))
    assert with_sinks[8:11] == [None, None, None]
    assert with_sinks[11] is sinks
    assert len(with_sinks) == 12
    assert with_spans[8:17] == [None] * 9
    assert with_spans[17] is spans


def test_segments_are_what_boundaries_say(nodes: list[Any]) -> None:
    boundaries = torch.tensor([0, 8, TOKENS], dtype=torch.int32)
    with tracing(Tracing()) as state:
        three = heads(4), heads(2), heads(2)
        varlen_attention(TinyAttention(), *three, None, cu_seq_lens_q=boundaries)
    [(operator, inputs, attributes)] = nodes
    assert operator == "com.glmcompile::VarlenAttention"
    assert inputs[3] is boundaries
    assert attributes == {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25}
    [found] = state.calls
    assert (found.shape.heads, found.shape.kv_heads, found.queries) == (4, 2, TOKENS)


def test_without_boundaries_each_member_of_the_batch_is_a_segment(nodes: list[Any]) -> None:
    three = [torch.zeros(3, 4, TOKENS, 16) for _ in range(3)]
    with tracing(Tracing()):
        output, _ = varlen_attention(TinyAttention(), *three, None)
    [(_, inputs, _)] = nodes
    assert inputs[3].tolist() == [0, TOKENS, 2 * TOKENS, 3 * TOKENS]
    assert inputs[0].shape == (3 * TOKENS, 64)
    assert output.shape == (3, TOKENS, 4, 16)


@pytest.mark.parametrize(
    ("masked", "keys", "size"),
    [(True, TOKENS, 16), (False, 5, 16), (False, TOKENS, 12)],
    ids=["a mask", "keys of another length", "a head size that no vector has"],
)
def test_what_the_operator_does_not_do_stays_standard(
    nodes: list[Any], masked: bool, keys: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, tokens, size, generator=generator)
        for count, tokens in ((4, TOKENS), (2, keys), (2, keys))
    )
    mask = torch.randn(1, 1, TOKENS, keys, generator=generator) if masked else None
    with tracing(Tracing()):
        output, _ = varlen_attention(TinyAttention(), query, key, value, mask)
    assert nodes == []
    key, value = (each.repeat_interleave(2, dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * size**-0.5 + (0 if mask is None else mask)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected)


def test_an_encoder_without_padding_has_no_mask() -> None:
    mask = mask_of("create_bidirectional_mask", implementation=VARLEN_ATTENTION)
    assert mask is None
    padding = torch.ones(1, TOKENS, dtype=torch.bool)
    padding[0, 5:] = False
    mask = mask_of(
        "create_bidirectional_mask", implementation=VARLEN_ATTENTION, attention_mask=padding
    )
    assert mask.shape[-2:] == (TOKENS, TOKENS)
    assert not mask[..., 5:].any()
