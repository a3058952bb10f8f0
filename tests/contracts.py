"""Contracts of models that do not exist, for tests that need one and no checkpoint."""

from __future__ import annotations

from typing import Any

from glmcompile.contract import (
    BLOCK_TABLE,
    COMPUTED,
    DECODER,
    FEATURE_ROWS,
    FEATURES,
    KEY_CACHE,
    LOGITS,
    LOGITS_ROWS,
    PAST_LENGTHS,
    POSITIONS,
    PROCESSED,
    SEQUENCE_ENDS,
    TOKEN_IDS,
    VALUE_CACHE,
    VISION,
    Attention,
    Component,
    Computed,
    Contract,
    Port,
    Rule,
    VisionContract,
)

LAYER = Attention(heads=4, kv_heads=2, head_size=16, value_size=16)
PATCHES: dict[str, Any] = {  # as JSON gives them
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 64,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


def text_contract(**changes: Any) -> Contract:
    """A text model of two layers. changes: fields that are others."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "vocab_size": 100,
        "context_length": 128,
        "eos_token_ids": (1, 2),
        "attention": (LAYER, LAYER),
        "positions": Rule("counted"),
        "position_axes": 1,
    }
    fields |= changes
    return Contract(**{"components": {DECODER: decoder_ports(fields["attention"])}, **fields})


def image_contract(**changes: Any) -> Contract:
    """An image model of two layers, its image token 9 and its merged patches 2 x 2."""
    vision = VisionContract(
        token_id=9,
        placeholder="<|image|>",
        processor=Rule("patches", PATCHES),
        computed=(
            Computed(Rule("patch_positions", {"spatial_merge_size": 2}), ("position_ids",)),
            Computed(Rule("segment_boundaries"), ("cu_seqlens",)),
        ),
        attention=(Attention(4, 4, 16, 16),),
    )
    encoder = Component(
        (
            Port("pixel_values", PROCESSED, "float32", ("patches", 1176)),
            Port("position_ids", COMPUTED, "int64", ("patches", 2)),
            Port("cu_seqlens", COMPUTED, "int32", ("segments_plus_1",)),
        ),
        (Port("image_features", FEATURES, "float32", ("image_tokens", 64)),),
    )
    return text_contract(
        **{
            "architecture": "Qwen2VLForConditionalGeneration",
            "positions": Rule("mrope", {"merge_size": 2}),
            "position_axes": 3,
            "components": {VISION: encoder, DECODER: decoder_ports((LAYER, LAYER), 3, 64)},
            "vision": vision,
            **changes,
        }
    )


def decoder_ports(attention: tuple[Attention, ...], axes: int = 1, features: int = 0) -> Component:
    """A decoder's ports. features: width of image features; 0 for a text model."""
    ports = [Port("input_ids", TOKEN_IDS, "int64", ("tokens",))]
    if features:
        ports += [
            Port("image_features", FEATURES, "float32", ("image_tokens", features)),
            Port("image_token_indices", FEATURE_ROWS, "int64", ("image_tokens",)),
        ]
    ports += [
        Port("position_ids", POSITIONS, "int64", ("tokens",) if axes == 1 else (axes, "tokens")),
        Port("cumulative_sequence_length", SEQUENCE_ENDS, "int32", ("sequences_plus_1",)),
        Port("past_seqlens", PAST_LENGTHS, "int32", ("sequences",)),
        Port("block_table", BLOCK_TABLE, "int32", ("sequences", "max_blocks")),
        Port("logits_indices", LOGITS_ROWS, "int64", ("rows",)),
    ]
    for layer, each in enumerate(attention):
        pool = ("num_blocks", "block_size", each.kv_heads)
        ports += [
            Port(f"key_cache.{layer}", KEY_CACHE, "float32", (*pool, each.head_size), layer),
            Port(f"value_cache.{layer}", VALUE_CACHE, "float32", (*pool, each.value_size), layer),
        ]
    return Component(tuple(ports), (Port("logits", LOGITS, "float32", ("rows", 100)),))
