"""What a type's processor files carry beyond what follows from its tiny config."""

from __future__ import annotations

from typing import Any

from benchmarks.architectures.tables import each

# Settings of the Processor beside its parts.
LLAVA = {"num_additional_image_tokens": 1}  # the class token, which "default" drops

PROCESSORS: dict[str, dict[str, Any]] = {
    **each("llava llava_next llava_next_video", LLAVA),
    "vipllava": {**LLAVA, "vision_feature_select_strategy": "default"},
    "llava_onevision": {"num_image_tokens": 16},
    "aria": {"size_conversion": {"490": 8, "980": 16}},
    "aya_vision": {"patch_size": 14, "downsample_factor": 2, "img_size": 56},
    **each("deepseek_vl deepseek_vl_hybrid janus", {"num_image_tokens": 16}),
    **each("gemma3 shieldgemma2 t5gemma2", {"image_seq_length": 4}),
    **each("gemma4 gemma4_unified diffusion_gemma", {"image_seq_length": 70}),
    "granite_docling": {"image_seq_len": 4},
    "perception_lm": {"patch_size": 14, "pooling_ratio": 2},
    "fast_vlm": {"patch_size": 64, "num_additional_image_tokens": 0},
    "kosmos-2.5": {"num_image_tokens": 8},
    "idefics2": {"image_seq_len": 8},
    **each("idefics3 smolvlm", {"image_seq_len": 4}),
    "ovis2": {"image_seq_length": 16},
    "chameleon": {"image_seq_length": 16},
    "kosmos-2": {"num_patch_index_tokens": 16},
}

# Settings that a processor reads from its tokenizer's.
TOKENIZERS: dict[str, dict[str, Any]] = {
    **each("kosmos-2.5 pix2struct", {"max_patches": 64}),  # otherwise a constant of 4096 or 2048
    "got_ocr2": {"num_image_tokens": 4},  # otherwise a constant of 256
}

# Settings of the image processor that do not follow from the vision config.
TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
SPLIT = {
    "do_image_splitting": True,
    "size": {"longest_edge": 4 * 56},
    "max_image_size": {"longest_edge": 56},
}

IMAGES: dict[str, dict[str, Any]] = {
    **each("internvl qianfan_ocr aya_vision", TILES),
    "deepseek_vl_hybrid": {"high_res_size": {"height": 256, "width": 256}},
    **each("gemma4 gemma4_unified diffusion_gemma", {"max_soft_tokens": 70}),  # the least allowed
    "granite_docling": {"size": {"height": 128, "width": 128}, "max_patches": 6},
    "fuyu": {"size": {"height": 120, "width": 180}},
    **each("kosmos-2.5 pix2struct", {"max_patches": 64}),
    # Its patch size counts tokens a side of a tile.
    "cohere2_vision": TILES | {"size": {"height": 64, "width": 64}, "patch_size": 2},
    "llama4": {"size": {"height": 56, "width": 56}, "max_patches": 4},
    **each("minicpm_ocr minicpmv4_6 minicpmv4_7", {"scale_resolution": 128, "patch_size": 16}),
    "minimax_m3_vl": {"size": {"shortest_edge": 4 * 28**2, "longest_edge": 64 * 28**2}},
    "molmo2": {"size": {"height": 56, "width": 56}, "max_crops": 4, "overlap_margins": [1, 1]},
    **each("muse_glimmer muse_spark", {"max_image_tokens": 36}),
    "step3p7": {
        "size": {"height": 112, "width": 112},
        "patch_size": 56,
        "max_image_size": 448,
    },
    "kimi_k25": {"size": {"max_height": 112, "max_width": 112}},
    "lfm2_vl": {
        "size": {"height": 64, "width": 64},
        "tile_size": 64,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
    },
    "nemotron_h_omni": {"min_num_patches": 16, "max_num_patches": 64},
    "perception_lm": {
        "size": {"height": 56, "width": 56},
        "tile_size": 56,
        "max_num_tiles": 6,
    },
    "gemma3n": {"size": {"height": 256, "width": 256}},
    "dots3_note": {"temporal_patch_size": 1},
    "idefics": {"image_size": 56},
    "apertus1p5": {"size": {"min_pixels": 64 * 64, "max_pixels": 128 * 128}},
    "pp_formulanet": {"size": {"height": 128, "width": 128}},
    "fast_vlm": {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 256, "width": 256},
        "do_normalize": False,
    },
    "paligemma": {"image_seq_length": 16},
    "mllama": {"max_image_tiles": 4},
    "idefics2": {
        "do_image_splitting": True,
        "size": {"shortest_edge": 28, "longest_edge": 56},
    },
    "idefics3": SPLIT,
    "smolvlm": SPLIT | {"size": {"longest_edge": 4 * 64}, "max_image_size": {"longest_edge": 64}},
    "chameleon": {
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
    },
    "emu3": {"min_pixels": 64 * 64, "max_pixels": 128 * 128},
    "florence2": {
        "image_seq_length": 17,
        "size": {"height": 128, "width": 128},
        "crop_size": {"height": 128, "width": 128},
    },
}

# What the published template writes for an image; "{image}" where a type is missing.
PLACEHOLDERS: dict[str, str] = {
    **each("glm4v glm46v glm4v_moe glm_ocr glmga glm5_next", "{image_start}{image}{image_end}"),
    **each(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp cosmos3_omni "
        "paddleocr_vl exaone4_5 hyperclovax_vision_v2 cohere_compass cosmos3_edge hy_v4_vl",
        "{vision_start}{image}{vision_end}",
    ),
    **each("aya_vision qianfan_ocr ovis2 llama4", "{placeholder}"),
    **each("blip blip-2 instructblip instructblipvideo florence2 kosmos-2.5 fuyu", ""),
    **each("gemma3 shieldgemma2 t5gemma2", "{boi}"),
    "got_ocr2": "<img>{image}</img>",
    "pp_chart2table": "<img>{image}{image}{image}{image}</img>",  # its processor adds none
    "ernie4_5_vl_moe": "{image_start}{image}{image_end}",
    "hunyuan_vl": "{image_start}{image}{image_end}",
    "kosmos-2": "<image></image>",
}
