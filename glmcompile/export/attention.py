"""The attention functions that transformers' modules call while a model is probed or traced.

What they need beside their arguments (the caches, the packed batch) comes from a context variable,
since not every forward hands keyword arguments on to its attention. Each call is recorded; whatever
a call asks for that no operator does is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from glmcompile.contract import Attention
from glmcompile.errors import UnsupportedArchitectureError

PAGED_ATTENTION = "glmcompile_paged"
# transformers passes cu_seqlens to the attention function only under a name containing "flash";
# otherwise it splits the patches by image, which a graph with dynamic sizes cannot hold.
VARLEN_ATTENTION = "glmcompile_flash_varlen"

_HEAD_SINK, _ATTEND_SPAN = 11, 17  # numbers of PagedAttention's inputs

# Arguments that say nothing of what is computed, or say again what the mask says.
_HARMLESS = {
    "cache", "cache_params", "cu_seq_lens_k", "deterministic", "dropout", "is_causal",
    "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as transformers' mask functions say.

    window: keys to the left, the query's own included; 0 for all. causal: none to the right.
    spans: tokens of one block see each other. other: names of functions that are not known.
    blocks: which block each token of the probe is in, negative for none.
    """

    causal: bool
    window: int = 0
    spans: bool = False
    other: tuple[str, ...] = ()
    blocks: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function by `module`.

    segments: tells tensors of boundaries apart, where these are given. queries: how many, of all
    members of the batch.
    """

    module: nn.Module
    shape: Attention
    mask: Mask | None
    cross: bool
    segments: int = 0
    queries: int = 0


@dataclass
class Tracing:
    """What the attention functions see while a component runs.

    caches: keys and values [num_blocks, block_size, kv_heads, head_size] of each layer, in the
    order of the calls; empty while a model is only probed. batch: cumulative_sequence_length,
    past_seqlens, block_table. spans: int32 [tokens, 2], the places of each token's image.
    """

    caches: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    batch: tuple[torch.Tensor, ...] = ()
    spans: torch.Tensor | None = None
    calls: list[AttentionCall] = field(default_factory=list)


_current: ContextVar[Tracing | None] = ContextVar("tracing", default=None)


@contextmanager
def tracing(state: Tracing) -> Iterator[Tracing]:
    """Let attention functions see `state` in the block."""
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """com.microsoft::PagedAttention over the layer's cache; com.glmcompile's where tokens of one
    image see each other.

    query, key, value: [1, heads, tokens, head_size], packed; output [1, tokens, heads, value_size].
    Raises UnsupportedArchitectureError for a mask or an argument that the operator does not know.
    """
    state = _current.get()
    assert state is not None
    _refuse_unknown(module, others)
    _, heads, tokens, head_size = query.shape
    kv_heads, value_size = key.shape[1], value.shape[-1]
    mask = _mask_of(module, attention_mask)
    index = len(state.calls)
    window = mask.window if mask is not None else 0
    shape = Attention(heads, kv_heads, head_size, value_size, window)
    cross = _different(key.shape[2], tokens)
    state.calls.append(AttentionCall(module, shape, mask, cross))
    _refuse_mask(module, mask, cross)
    packed = [
        each.transpose(1, 2).reshape(tokens, each.shape[1] * each.shape[3])
        for each in (query, key, value)
    ]
    caches = state.caches[index] if state.caches else ()
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(scaling if scaling is not None else head_size**-0.5),
    }
    if shape.window:
        attributes["local_window_size"] = shape.window
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    inputs = [*packed, *caches, *state.batch]
    domain = "com.microsoft"
    if s_aux is not None:
        inputs += [None] * (_HEAD_SINK - len(inputs)) + [s_aux]
    if mask is not None and mask.spans and state.spans is not None:
        inputs += [None] * (_ATTEND_SPAN - len(inputs)) + [state.spans]
        domain = "com.glmcompile"
    output = torch.onnx.ops.symbolic(
        f"{domain}::PagedAttention",
        inputs,
        attributes,
        dtype=query.dtype,
        shape=(tokens, heads * value_size),
        version=1,
    )
    return output.view(1, tokens, heads, value_size), None


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """com.glmcompile::VarlenAttention: non-causal inside each segment of cu_seq_lens_q.

    query, key, value: [batch, heads, tokens, head_size]; without cu_seq_lens_q each member of the
    batch is a segment. What the operator does not do (a mask, keys of another length) stays
    attention of the standard operators.
    """
    state = _current.get()
    assert state is not None
    _refuse_unknown(module, others)
    batch, heads, tokens, head_size = query.shape
    shape = Attention(heads, key.shape[1], head_size, value.shape[-1])
    cross = _different(key.shape[2], tokens)
    state.calls.append(AttentionCall(module, shape, None, cross, id(cu_seq_lens_q), batch * tokens))
    if attention_mask is not None or cross or value.shape[-1] != head_size or head_size % 8:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=key.shape[1] != heads
        )
        return output.transpose(1, 2), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32) * tokens
    packed = [
        # The modules unsqueeze and transpose each of these; undone in the same order, both cancel.
        each.squeeze(0).transpose(0, 1).reshape(tokens, each.shape[1] * head_size)
        if isinstance(batch, int) and batch == 1
        else each.transpose(1, 2).reshape(batch * tokens, each.shape[1] * head_size)
        for each in (query, key, value)
    ]
    output = torch.onnx.ops.symbolic(
        "com.glmcompile::VarlenAttention",
        (*packed, cu_seq_lens_q),
        {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": float(scaling if scaling is not None else head_size**-0.5),
        },
        dtype=query.dtype,
        shape=(packed[0].shape[0], heads * head_size),
        version=1,
    )
    return output.view(batch, tokens, heads, head_size), None


def _different(one: Any, other: Any) -> bool:
    """Whether two lengths differ, also where one is known at run time only."""
    return str(one) != str(other)


def _refuse_unknown(module: nn.Module, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _HARMLESS:
            raise _unsupported(module, f"the attention argument {name}")


def _refuse_mask(module: nn.Module, mask: Mask | None, cross: bool) -> None:
    if cross:
        raise _unsupported(module, "attention to another sequence (cross-attention)")
    if mask is None or not mask.causal:
        raise _unsupported(module, "attention to later tokens")
    if mask.other:
        raise _unsupported(module, f"the mask {', '.join(mask.other)}")


def _unsupported(module: nn.Module, what: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{type(module).__name__} needs {what}, which the engine's attention does not do"
    )


# What an opaque mask says, by the attribute it is kept under.
_SAYS = "glmcompile_mask"


def _opaque_mask(*arguments: Any, mask_function: Callable[..., Any], **others: Any) -> torch.Tensor:
    """A stand-in that remembers what the mask says: the operator does causality and windows."""
    stand_in = torch.zeros(1, 1, 1, 1)
    setattr(stand_in, _SAYS, _read_mask(mask_function))
    return stand_in


def _mask_of(module: nn.Module, attention_mask: torch.Tensor | None) -> Mask | None:
    if attention_mask is None:
        return None
    mask = getattr(attention_mask, _SAYS, None)
    if mask is None:
        raise _unsupported(module, "an attention mask of its own")
    assert isinstance(mask, Mask)
    return mask


def _padding_mask(**arguments: Any) -> Any:
    """The mask of padded images; None where nothing is padded."""
    return None if arguments.get("attention_mask") is None else sdpa_mask(**arguments)


def _read_mask(function: Callable[..., Any]) -> Mask:
    """Take a mask function of transformers.masking_utils apart by its closures."""
    causal, window, spans, other = False, 0, False, []
    blocks: tuple[int, ...] = ()
    for name, values in _parts(function):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            window = int(values["sliding_window"])
        elif name == "blockwise_overlay":
            spans = True
            ids = values["block_sequence_ids"]
            if type(ids) is torch.Tensor:  # and not one that is traced
                blocks = tuple(ids[0].tolist())
        # The rest of these names combine others, or tell sequences apart by their position ids.
        elif name not in ("and_masks", "or_masks", "remap_positions_for_packed_sequence",
                          "packed_sequence_mask_function"):  # fmt: skip
            other.append(name)
    return Mask(causal, window, spans, tuple(other), blocks)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and closure of a mask function and of those that it combines."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    values = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=False)
    }
    yield function.__qualname__.split(".")[0], values
    for value in values.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if callable(each) and not isinstance(each, torch.Tensor):
                yield from _parts(each)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
AttentionMaskInterface.register(PAGED_ATTENTION, _opaque_mask)
AttentionMaskInterface.register(VARLEN_ATTENTION, _padding_mask)
