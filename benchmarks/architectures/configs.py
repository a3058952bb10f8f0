"""Tiny configs: a type's published config, with every size shrunk by the name of its field.

Relations stay: grouped heads stay grouped, heads wider than the hidden size stay wider, and each
per-layer list keeps the published order and every kind of layer.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.architectures.overrides import CODES, PUBLISHED, TINY, VISUAL_TOKENS
from benchmarks.architectures.tables import each, words
from benchmarks.architectures.tokens import is_config, named_tokens, set_token_ids, token_ids

VOCABULARY = 384  # 256 bytes, then special tokens, then rows that no text produces
CONTEXT = 2048
TEXT_HIDDEN, VISION_HIDDEN = 64, 96  # unequal, so that a mix-up of the two fails
HEADS, INTERMEDIATE, EXPERTS, CHOSEN, WINDOW = 4, 128, 8, 2, 24
GRID = 4  # patches a side of an image or tile

VISION = ("vision", "vq_", "encoder_config", "sam_", "protein_", "audio_", "adapter_")

LAYERS = words(
    "num_hidden_layers num_layers num_decoder_layers n_layer n_layers layers depth encoder_layers "
    "decoder_layers decoder_num_layers conf_num_hidden_layers"
)
HEAD_COUNTS = words(
    "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads resampler_n_heads "
    "resampler_heads linear_num_heads index_n_heads indexer_n_heads conf_num_attention_heads"
)
KV_HEAD_COUNTS = words("num_key_value_heads num_kv_heads swa_num_key_value_heads indexer_kv_heads")
HEAD_SIZES = set(words("head_dim swa_head_dim global_head_dim d_kv"))
LATENT_SIZES = set(words("qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim head_dim"))
HIDDEN = words("hidden_size d_model n_embd embed_dim")

# Sizes that do not depend on others. A field that is None, 0 or a bool stays as it is.
TEXT_SIZES = each(
    "hidden_size d_model n_embd embed_dim word_embed_proj_dim text_hidden_size projection_dim "
    "out_hidden_size decoder_hidden_size moe_hidden_size image_token_embed_dim "
    "projector_output_dim adapter_out_dim mm_embed_dim output_proj_dims",
    TEXT_HIDDEN,
)
VISION_SIZES = TEXT_SIZES | each("hidden_size d_model embed_dim", VISION_HIDDEN)
SIZES = (
    each(
        "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim "
        "ffn_hidden_size dense_intermediate_size intermediate_size_mlp projector_hidden_size "
        "alignment_intermediate_size merged_hidden_size projection_intermediate_size "
        "projection_hidden_dim decoder_intermediate_size",
        INTERMEDIATE,
    )
    | each(
        "encoder_hidden_size vision_hidden_size projection_hidden_size adapter_in_dim "
        "cross_attention_hidden_size "
        "adapter_input_size",
        VISION_HIDDEN,
    )
    | each(
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size output_vocab_size",
        VOCABULARY,
    )
    | each("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS)
    | each(
        "moe_intermediate_size shared_expert_intermediate_size share_expert_dim "
        "shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
        32,
    )
    | each("sliding_window sliding_window_size attention_chunk_size", WINDOW)
    | {
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "resampler_head_dim": 24,
        "resampler_dim_head": 24,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,  # twice the key heads, as published
        "index_head_dim": 16,
        "index_topk": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,  # heads x size is twice the hidden size, as published
        "state_size": 16,
        "ssm_state_size": 16,
        "mamba_d_state": 16,
        "num_query_tokens": 8,
        "resampler_n_latents": 8,
        "resampler_num_latents": 8,
        "latent_query_num": 8,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 16,
        "num_position_embeddings": GRID**2,
        "num_patches": GRID**2,
        "position_embedding_size": 64,
        "mm_posemb_size": 64,
        "downsample_hidden_size": 32,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "base_channels": 32,
        "insert_layer_id": 1,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "floor_scale": 128,
        "rel_extent": 32,
        "log_scaling_n_floor": 256,
        "image_seq_length": GRID**2,
    }
)
# At most these: a published smaller value stays.
LIMITS = (
    each("max_position_embeddings n_positions max_seq_len n_ctx", CONTEXT)
    | each("num_experts_per_tok moe_k top_k_experts", CHOSEN)
    | each("n_groups mamba_n_groups", 2)
    | each("chunk_size mamba_chunk_size", 32)
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
)
# Which layers a feature is taken from, or which differ: all of them lie within four layers.
INDEXES = {
    "fullatt_block_indexes": [1, 3],
    "global_attn_indexes": [1, 3],
    "deepstack_visual_indexes": [0, 1, 2],
    "intermediate_layers_indices": [1, 2],
    "cross_attention_layers": [1, 3],
    "attn_layer_indices": [1, 3],
}


def published(model_type: str):
    """The type's default config, completed where the default is not what checkpoints carry."""
    kind, more = CONFIG_MAPPING[model_type], PUBLISHED.get(model_type, {})
    try:
        start = kind().to_dict()
    except Exception:  # an incomplete default fails in as many ways as there are types
        start = {}
    return kind.from_dict(merged(start, more))


def tiny(model_type: str):
    """The config of a tiny checkpoint: published, shrunk, then this type's own exceptions."""
    small = merged(shrunk(published(model_type).to_dict()), TINY.get(model_type, {}))
    ids = token_ids(special_tokens(model_type))
    set_token_ids(small, ids)
    if name := VISUAL_TOKENS.get(model_type):  # the last tokens of the vocabulary
        small["vocabulary_map"] = {"<image>": ids["image"], "<|extra_200|>": ids.get("eol")} | {
            name(code): VOCABULARY - CODES + code for code in range(CODES)
        }
    return CONFIG_MAPPING[model_type].from_dict(small)


def special_tokens(model_type: str) -> dict[str, str]:
    """Role -> text of each special token, in the order of their ids."""
    return named_tokens(model_type, published(model_type).to_dict())


def differences(model_type: str) -> dict[str, tuple[Any, Any]]:
    """Every setting in which the tiny config differs from the type's default: (default, used)."""
    try:
        default = CONFIG_MAPPING[model_type]().to_dict()
    except Exception:
        default = published(model_type).to_dict()
    old, new = flat(default), flat(tiny(model_type).to_dict())
    ignored = PreTrainedConfig().to_dict().keys() - {"eos_token_id", "bos_token_id", "pad_token_id"}
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name.rpartition(".")[2] not in ignored
    }


def merged(start: dict, more: dict) -> dict:
    """A copy of `start` with `more` laid over it, nested dicts field by field."""
    result = copy.deepcopy(start)
    for name, value in more.items():
        old = result.get(name)
        nested = is_config(name, value) and isinstance(old, dict)
        if nested and value.get("model_type", old.get("model_type")) == old.get("model_type"):
            result[name] = merged(old, value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, those of nested configs and of RoPE one by one."""
    result = {}
    for name, value in settings.items():
        if is_config(name, value) or (name == "rope_parameters" and isinstance(value, dict)):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def shrunk(config: dict, vision: bool = False) -> dict:
    """The same settings at a tiny size; nested configs too."""
    layers = layer_count(config, vision)
    sizes = SIZES | (VISION_SIZES if vision else TEXT_SIZES)
    small = {}
    for name, value in config.items():
        if is_config(name, value):
            small[name] = shrunk(value, vision or name.startswith(VISION))
        elif isinstance(value, list) and name in INDEXES:
            small[name] = INDEXES[name]
        elif isinstance(value, list) and value and len(value) == published_layers(config):
            small[name] = [shrunk_number(name, each, sizes) for each in value[:layers]]
        elif name in LAYERS and value:
            small[name] = min(value, layers)
        else:
            small[name] = shrunk_number(name, value, sizes)
    if small.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = layers // 2
    shrink_heads(config, small)
    if config.get("per_layer_config"):
        shrink_layers(config, small)
    shrink_images(config, small)
    shrink_rope(config, small)
    return small


def shrunk_number(name: str, value: Any, sizes: dict[str, int]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name in HEAD_COUNTS:
        return min(value, HEADS)
    return min(value, LIMITS[name]) if name in LIMITS else sizes.get(name, value)


def published_layers(config: dict) -> int:
    return next((config[name] for name in LAYERS if isinstance(config.get(name), int)), 0)


def layer_count(config: dict, vision: bool) -> int:
    """How many layers show every kind: 4 (3 for vision), or up to the last kind's first use."""
    count = published_layers(config)
    least = 3 if vision and not any(isinstance(config.get(name), list) for name in INDEXES) else 4
    for value in config.values():
        kinds = isinstance(value, list) and all(isinstance(kind, (str, int)) for kind in value)
        if kinds and len(value) == count and len(set(value)) < 5:
            least = max(least, max(value.index(kind) for kind in value) + 1)
    if shared := config.get("num_kv_shared_layers"):
        least, count = 2 * least, count + shared  # every kind with K/V of its own, then shared
    return min(least, count) if count else least


def shrink_heads(config: dict, small: dict) -> None:
    """K/V heads stay equal, one, or a share; a head stays as wide for its hidden size."""
    heads = next((config[name] for name in HEAD_COUNTS if config.get(name)), 0)
    few = next((small[name] for name in HEAD_COUNTS if config.get(name)), 0)
    for name in KV_HEAD_COUNTS:
        if value := config.get(name):
            small[name] = few if value >= heads else 1 if value == 1 else max(few // 2, 1)
    hidden, small_hidden = config.get("hidden_size"), small.get("hidden_size")
    for name in HEAD_SIZES:
        value = config.get(name)
        if value and heads and isinstance(hidden, int):
            width = value * heads / hidden * small_hidden / few
            small[name] = max(8, 8 * round(width / 8))
    if config.get("qk_rope_head_dim") is not None:  # latent attention: K and V differ in size
        for name in LATENT_SIZES & small.keys():
            small[name] = config[name] // 8
    before, after = head_size(config), head_size(small)
    for name in ("query_pre_attn_scalar", "rotary_dim"):
        if small.get(name):
            small[name] = config[name] * after // before
    if scale := config.get("attention_multiplier"):  # 1/d or 1/sqrt(d), for heads of size d
        powers = [power for power in (-1.0, -0.5) if math.isclose(scale, before**power)]
        small["attention_multiplier"] = after ** powers[0] if powers else scale


def head_size(config: dict) -> int:
    """The size of a head, or 0 where a config has none."""
    counts = (config.get(name) for name in HEAD_COUNTS)
    heads = next((count for count in counts if isinstance(count, int) and count), 0)
    hidden = next((config[name] for name in HIDDEN if isinstance(config.get(name), int)), 0)
    return config.get("head_dim") or (hidden // heads if heads else 0)


def shrink_layers(config: dict, small: dict) -> None:
    """What single layers override, for the layers that are left."""
    layers = {int(layer): changes for layer, changes in config["per_layer_config"].items()}
    plain = {name: value for name, value in config.items() if name != "per_layer_config"}
    small["per_layer_config"] = {}
    for layer, changes in layers.items():
        if layer < published_layers(small):
            new = shrunk(plain | changes)
            for name in HEAD_SIZES & changes.keys():
                new[name] = changes[name] * small[name] // config[name]
            small["per_layer_config"][layer] = {name: new[name] for name in changes}


def shrink_images(config: dict, small: dict) -> None:
    """Images of GRID x GRID patches; the patch size stays."""
    patch, size = config.get("patch_size"), config.get("image_size")
    if size and patch:
        side = GRID * (patch[0] if isinstance(patch, list) else patch)
        small["image_size"] = [side] * len(size) if isinstance(size, list) else side
    if grids := config.get("image_grid_pinpoints"):  # sizes in pixels, whole tiles
        tile, tiny_tile = (each["vision_config"]["image_size"] for each in (config, small))
        small["image_grid_pinpoints"] = [
            [side // tile * tiny_tile for side in grid] for grid in grids
        ]


def shrink_rope(config: dict, small: dict) -> None:
    """Sections of multimodal RoPE and the original context of a scaled one keep their shares."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    small["rope_parameters"] = rope = copy.deepcopy(rope)
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if original := part.get("original_max_position_embeddings"):
            share = original / (config.get("max_position_embeddings") or original)
            part["original_max_position_embeddings"] = max(16, round(CONTEXT * share))
        if "max_position_embeddings" in part:
            part["max_position_embeddings"] = CONTEXT
        if sections := part.get("mrope_section"):
            size = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
            half = math.floor(size * part.get("partial_rotary_factor", 1.0)) // 2
            part["mrope_section"] = shares(sections, half)


def shares(parts: list[int], total: int) -> list[int]:
    """`total` split in the proportions of `parts`: the largest remainders get what rounding left.

    Equal parts stay equal where they can, and no part becomes zero.
    """
    exact = [part * total / sum(parts) for part in parts]
    result = [max(1, math.floor(share)) for share in exact]
    while sum(result) < total:
        lacking = [share - given for share, given in zip(exact, result, strict=True)]
        result[lacking.index(max(lacking))] += 1
    return result
