"""The contract of a checkpoint's model, and what compiling must know of its modules beside it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import (
    BLOCK_TABLE,
    DECODER,
    FEATURE_ROWS,
    FEATURES,
    IMAGE_SPANS,
    KEY_CACHE,
    LOGITS,
    LOGITS_ROWS,
    PAST_LENGTHS,
    POSITIONS,
    SEQUENCE_ENDS,
    STATE,
    STATE_SLOTS,
    TOKEN_IDS,
    VALUE_CACHE,
    VISION,
    Attention,
    Component,
    Contract,
    Port,
    Rule,
)
from glmcompile.discover.images import Images, find_images
from glmcompile.discover.probe import Trail, path_of
from glmcompile.errors import (
    CheckpointError,
    GlmcompileError,
    UnsupportedArchitectureError,
    brief,
)
from glmcompile.export.attention import (
    PAGED_ATTENTION,
    VARLEN_ATTENTION,
    StateCall,
    Tracing,
    tracing,
)
from glmcompile.export.components import (
    EXAMPLE_SIZES,
    Decoder,
    Structure,
    example_inputs,
    features_owner,
    unchecked,
)
from glmcompile.export.skeleton import build_skeleton, set_attention
from glmcompile.rules import POSITION_RULES, SPAN_RULES
from glmcompile.runtime.transformers_processor import TOKEN_KINDS

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def discover(checkpoint: Checkpoint) -> tuple[Contract, Structure]:
    """Run a checkpoint's model without its weights and say what it takes, gives and consists of.

    Raises UnsupportedArchitectureError naming the module and the reason where it cannot be
    compiled, CheckpointError for a configuration that contradicts itself.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model: Any = build_skeleton(checkpoint, mode, VARLEN_ATTENTION)
    table, head = (
        path_of(model, module)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if not table or not head:
        raise _unsupported(checkpoint, "it has no token embedding or no output layer of its own")
    images = None
    if features_owner(model) is not None:
        images = find_images(checkpoint, model)
    elif checkpoint.architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        raise _unsupported(
            checkpoint, "it takes images, but has no get_image_features to compute features by"
        )
    set_attention(model, PAGED_ATTENTION)
    text = checkpoint.config.get_text_config()
    hidden = model.get_submodule(table).weight.shape[1]
    positions = _positions(model, checkpoint, images)
    axes = 3 if positions.name == "mrope" else 1
    structure = Structure(
        layers={},
        uniform=frozenset(),
        table=table,
        head=head,
        called={},
        takes_positions="position_ids" in _arguments(model),
        types={
            name: images.kinds.get(name, 1) if images is not None else 0
            for name in TOKEN_KINDS
            if name in _arguments(model)
        },
        form=images.form if images is not None else None,
        fixed=images.fixed if images is not None else {},
        example=images.example if images is not None else {},
        patches_per_unit=images.patches_per_unit if images is not None else 1.0,
        patches_per_token=images.patches_per_token if images is not None else 1.0,
    )
    width = hidden * (1 + images.form.deepstack) if images is not None else 0
    probed = Component(_step_inputs((), axes, width, False), ())
    ids = _example_prompt(images)
    trail, state = _probe(checkpoint, model, structure, probed, ids)
    spans = _span_rule(checkpoint, state, ids, images)
    attention = tuple(call.shape for call in state.calls)
    components = {
        DECODER: Component(
            _step_inputs(attention, axes, width, spans is not None, state.states),
            (Port("logits", LOGITS, "float32", ("rows", text.vocab_size)),),
        )
    }
    layers, called = {DECODER: trail.layers}, {DECODER: frozenset(trail.called)}
    uniform = {DECODER} if trail.is_uniform(model, state.calls) else set()
    if images is not None:
        components = {VISION: images.component, **components}
        layers[VISION], called[VISION] = images.trail.layers, frozenset(images.trail.called)
        uniform |= {VISION} if images.uniform else set()
    contract = Contract(
        architecture=checkpoint.architecture,
        hidden_size=hidden,
        vocab_size=text.vocab_size,
        context_length=_context_length(checkpoint, text),
        eos_token_ids=_end_tokens(checkpoint, text),
        attention=attention,
        positions=positions,
        position_axes=axes,
        components=components,
        vision=images.contract if images is not None else None,
        spans=spans,
    )
    found = replace(structure, layers=layers, called=called, uniform=frozenset(uniform))
    return contract, found


def _probe(
    checkpoint: Checkpoint,
    model: nn.Module,
    structure: Structure,
    component: Component,
    ids: torch.Tensor,
) -> tuple[Trail, Tracing]:
    """Run the decoder on an example prompt."""
    inputs: dict[str, torch.Tensor] = dict(
        zip((port.role for port in component.inputs), example_inputs(component), strict=True)
    )
    step = Decoder(model, structure, component)
    trail = Trail()
    state = Tracing(layer=lambda: trail.layers[-1] if trail.layers else "")
    tokens = len(ids)
    try:
        with (
            torch.no_grad(), tracing(state), trail.watching(model), unchecked(),
        ):  # fmt: skip
            step.call(
                ids,
                torch.arange(tokens).expand(inputs[POSITIONS].shape),
                inputs[LOGITS_ROWS],
                inputs.get(FEATURES),
                _IMAGE_ROWS if FEATURES in inputs else None,
            )
    except GlmcompileError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise _unsupported(
            checkpoint, f"its decoder cannot be run without weights ({brief(error)})"
        ) from error
    idle = _layers_without_state(model, trail, state)
    if idle:
        raise _unsupported(
            checkpoint,
            f"{idle[0]} ({type(model.get_submodule(idle[0])).__name__}) keeps something from token "
            "to token outside transformers' attention interface",
        )
    if not state.calls and not state.states:
        raise _unsupported(
            checkpoint, "no layer calls transformers' attention interface or a known recurrence"
        )
    return trail, state


# Of the example prompt the tokens that take image features.
_IMAGE_ROWS = torch.arange(3, 3 + EXAMPLE_SIZES["image_tokens"])


def _example_prompt(images: Images | None) -> torch.Tensor:
    """Token ids with one image among them."""
    ids = torch.arange(EXAMPLE_SIZES["tokens"])
    if images is not None:
        ids[ids == images.contract.token_id] = 0
        ids[_IMAGE_ROWS] = images.contract.token_id
    return ids


def _span_rule(
    checkpoint: Checkpoint, state: Tracing, ids: torch.Tensor, images: Images | None
) -> str | None:
    """The rule that gives the blocks of tokens that see each other; None where there are none."""
    masks = [call.mask for call in state.calls if call.mask is not None and call.mask.spans]
    if not masks or images is None:
        return None
    blocks = np.array(masks[0].blocks)
    for name, rule in SPAN_RULES.items():
        expected = np.full(len(blocks), False)
        for start, end in rule(ids.numpy(), images.contract.token_id):
            expected[start:end] = True
        if all(np.array_equal(np.array(mask.blocks) >= 0, expected) for mask in masks):
            return name
    raise _unsupported(checkpoint, "which of its tokens see each other follows no known rule")


def _layers_without_state(model: nn.Module, trail: Trail, state: Tracing) -> list[str]:
    """Layers that take a cache but called no attention function: recurrent ones, or attention of
    their own, both of which a graph would hold wrongly."""
    paths = {id(module): path for path, module in model.named_modules()}
    attending = [paths[id(call.module)] for call in state.calls]
    attending += [call.layer for call in state.states]
    found = []
    for layer in trail.layers:
        if any(path.startswith(f"{layer}.") or path == layer for path in attending):
            continue
        for module in model.get_submodule(layer).modules():
            names = inspect.signature(module.forward).parameters
            if module is not model.get_submodule(layer) and _CACHES & set(names):
                found.append(layer)
                break
    return found


_CACHES = {"cache", "cache_params", "past_key_values", "layer_past", "past_key_value"}


def _step_inputs(
    attention: tuple[Attention, ...],
    axes: int,
    features: int,
    spans: bool,
    states: Sequence[StateCall] = (),
) -> tuple[Port, ...]:
    """The decoder's ports.

    features: width of image features; 0 without images. spans: tokens of an image see each other.
    """
    positions: tuple[int | str, ...] = ("tokens",) if axes == 1 else (axes, "tokens")
    ports = [Port("input_ids", TOKEN_IDS, "int64", ("tokens",))]
    if features:
        ports += [
            Port("image_features", FEATURES, "float32", ("image_tokens", features)),
            Port("image_token_indices", FEATURE_ROWS, "int64", ("image_tokens",)),
        ]
    ports += [
        Port("position_ids", POSITIONS, "int64", positions),
        Port("cumulative_sequence_length", SEQUENCE_ENDS, "int32", ("sequences_plus_1",)),
        Port("past_seqlens", PAST_LENGTHS, "int32", ("sequences",)),
        Port("block_table", BLOCK_TABLE, "int32", ("sequences", "max_blocks")),
        Port("logits_indices", LOGITS_ROWS, "int64", ("rows",)),
    ]
    if spans:
        ports.append(Port("attend_span", IMAGE_SPANS, "int32", ("tokens", 2)))
    if states:
        ports.append(Port("state_slots", STATE_SLOTS, "int32", ("sequences",)))
    for number, call in enumerate(states):
        shape: tuple[int | str, ...] = ("num_slots", *call.shape)
        ports.append(Port(f"state.{number}", STATE, "float32", shape, number))
    for layer, each in enumerate(attention):
        pool = ("num_blocks", "block_size", each.kv_heads)
        ports += [
            Port(f"key_cache.{layer}", KEY_CACHE, "float32", (*pool, each.head_size), layer),
            Port(f"value_cache.{layer}", VALUE_CACHE, "float32", (*pool, each.value_size), layer),
        ]
    return tuple(ports)


def _first_position(model: Any) -> int:
    """Where a prompt's positions begin, by what `generate` would give the model."""
    ids = torch.arange(4)[None]
    try:
        given = model.prepare_inputs_for_generation(
            ids, attention_mask=torch.ones_like(ids), position_ids=ids.clone(), use_cache=False
        )
        positions = given["position_ids"].reshape(-1)
    except Exception:  # it wants what a whole generation gives: positions are as usual
        return 0
    first = int(positions[0])
    return first if torch.equal(positions, ids[0] + first) else 0


def _positions(model: Any, checkpoint: Checkpoint, images: Images | None) -> Rule:
    """The rule that gives the positions that the model itself would compute."""
    owners = [each for each in (model, getattr(model, "model", None)) if each is not None]
    owner = next((each for each in owners if hasattr(each, "get_rope_index")), None)
    if owner is None or images is None:
        first = _first_position(model)
        return Rule("counted", {"first": first} if first else {})
    rule = Rule("mrope", {"merge_size": checkpoint.config.vision_config.spatial_merge_size})
    grids = np.array([(1, 4, 8), (1, 6, 4)], np.int64) * [1, 1, 1]
    counts = [int(np.prod(grid)) // rule.arguments["merge_size"] ** 2 for grid in grids]
    token = images.contract.token_id
    ids = np.array([1, 2, *[token] * counts[0], 3, *[token] * counts[1], 4, 5], np.int64)
    expected, delta = owner.get_rope_index(
        torch.from_numpy(ids)[None],
        mm_token_type_ids=torch.from_numpy((ids == token).astype(np.int64))[None],
        image_grid_thw=torch.from_numpy(grids),
    )
    found, following = POSITION_RULES["mrope"](ids, grids, token, **rule.arguments)
    if not np.array_equal(found, expected[:, 0].numpy()) or following - len(ids) != int(delta):
        raise _unsupported(checkpoint, "its positions (get_rope_index) follow no known rule")
    return rule


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _context_length(checkpoint: Checkpoint, text: transformers.PreTrainedConfig) -> int:
    for name in _CONTEXT:
        length = getattr(text, name, None)
        if isinstance(length, int):
            if length < 1:
                raise CheckpointError(f"config.json: {name} is {length}, expected at least 1")
            return length
    raise _unsupported(checkpoint, "its configuration does not say how long a context may be")


def _end_tokens(checkpoint: Checkpoint, text: transformers.PreTrainedConfig) -> tuple[int, ...]:
    """Tokens that end a generation: generation_config.json first, as `generate` reads them."""
    sources = (
        ("generation_config.json", checkpoint.generation),
        ("config.json", checkpoint.config.to_dict()),
        ("config.json", text.to_dict()),
    )
    for file, source in sources:
        ids: Any = source.get("eos_token_id")
        if ids is not None:
            every = ids if isinstance(ids, list | tuple) else [ids]
            if not all(isinstance(id, int) for id in every):
                raise CheckpointError(
                    f"{checkpoint.directory / file}: eos_token_id is {ids!r}; expected a token id "
                    "or a list of them; fetch it again"
                )
            return tuple(every)
    return ()


def _unsupported(checkpoint: Checkpoint, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"{checkpoint.architecture} cannot be compiled: {why}")
