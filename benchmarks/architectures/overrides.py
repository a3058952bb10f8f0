"""What a type's config needs beyond generic shrinking, and why.

`PUBLISHED` completes default configs that lack what checkpoints of the type carry. `TINY` gives
sizes that depend on one another in ways field names do not tell.
"""

from __future__ import annotations

from typing import Any

from benchmarks.architectures.tables import each


def clip(size: int = 336) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
    }


def siglip(size: int = 384, **more) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
        **more,
    }


def rope(sections: list[int] | None = None, theta: float = 1e6, **more) -> dict[str, Any]:
    """Text RoPE as published: multimodal where sections are given."""
    settings = {"rope_type": "default", "rope_theta": theta, **more}
    if sections:
        settings["mrope_section"] = sections
    return {"text_config": {"rope_parameters": settings}}


GLM_ROPE = rope([8, 12, 12], theta=1e4, partial_rotary_factor=0.5)
QWEN2_ROPE = rope([16, 24, 24])
QWEN3_ROPE = rope([24, 20, 20], theta=5e6, mrope_interleaved=True)
QWEN3_5_ROPE = rope([11, 11, 10], theta=1e7, mrope_interleaved=True, partial_rotary_factor=0.25)

GEMMA3 = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5
        + ["sliding_attention"] * 4,
        "sliding_window": 1024,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "vision_config": siglip(896, vision_use_head=False),
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
}
LFM2_LAYERS = ["conv", "conv", "full_attention"] * 3 + ["conv", "full_attention"] * 3 + ["conv"]
LFM2 = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "layer_types": LFM2_LAYERS,
    "full_attn_idxs": [i for i, kind in enumerate(LFM2_LAYERS) if kind == "full_attention"],
}
DEEPSEEK_OCR_TEXT = {
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 896,
    "mlp_layer_types": ["dense"] + ["sparse"] * 11,
}
OMNI = {
    **QWEN2_ROPE,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
T5GEMMA2_LAYERS = (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
GEMMA4_LAYERS = (["sliding_attention"] * 4 + ["full_attention"]) * 7
DEEPSEEK_VISION = {
    "vision_config": siglip(384, patch_size=16, num_hidden_layers=24, vision_use_head=False)
}

PUBLISHED: dict[str, dict[str, Any]] = {
    # The defaults leave multimodal RoPE's sections to constants of the code.
    **each("glm4v glm46v glm_ocr glmga", GLM_ROPE),
    **each("qwen2_vl qwen2_5_vl", QWEN2_ROPE),
    **each("qwen3_vl qwen3_vl_moe cosmos3_omni", QWEN3_ROPE),
    **each("qwen3_5 qwen3_5_moe", QWEN3_5_ROPE),
    "paddleocr_vl": rope([16, 24, 24], theta=5e5),
    "ernie4_5_vl_moe": rope([22, 22, 20], theta=5e5),
    # 96 heads of 128 in a hidden size of 4096; the default derives 42 from the two.
    "glm4v_moe": {"text_config": {"head_dim": 128, **GLM_ROPE["text_config"]}},
    # The default vision configs are SigLIP's or Idefics3's own, at 224 pixels and 32 a patch.
    "aria": {"vision_config": {**siglip(980), "model_type": "idefics3_vision"}},
    "aya_vision": {"vision_config": siglip(364)},
    **each("deepseek_vl deepseek_vl_hybrid", DEEPSEEK_VISION),
    "idefics2": {"vision_config": {**siglip(980), "model_type": "idefics2"}},
    "idefics3": {"vision_config": {**siglip(364), "model_type": "idefics3_vision"}},
    "smolvlm": {"vision_config": {**siglip(512, patch_size=16), "model_type": "smolvlm_vision"}},
    # The 4B checkpoint: the default is another model's text sizes and SigLIP's default.
    **each("gemma3 shieldgemma2", GEMMA3),
    # The E2B checkpoint: K/V of the last layers shared, per-layer embeddings, wide MLPs; no audio.
    "gemma4": {
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "num_key_value_heads": 1,
            "layer_types": GEMMA4_LAYERS,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
            "per_layer_config": {
                i: {"head_dim": 512} for i, kind in enumerate(GEMMA4_LAYERS) if "full" in kind
            },
        },
        "vision_config": {"model_type": "gemma4_vision"},
    },
    # Text decoders whose defaults leave out what their checkpoints use.
    "bloom": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "deepseek_v3": {
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "glm4_moe": {"head_dim": 128},
    **each("granite granitemoe", GRANITE),
    "lfm2": LFM2,
    "lfm2_vl": {"text_config": LFM2},
    "phi3": {"sliding_window": 2047},
    "starcoder2": {"sliding_window": 4096},
    # The default has no RoPE: it turns in the layers with a window, and the others have none.
    "cohere_compass": {
        "text_config": {
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 10,
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 5e4,
                    "mrope_section": [24, 20, 20],
                },
                "full_attention": None,
            },
        }
    },
    "deepseek_ocr2": {
        "text_config": DEEPSEEK_OCR_TEXT,
        "vision_config": {
            "encoder_config": {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "layer_types": ["full_attention"] * 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            }
        },
    },
    # Window Q-Formers that halve each side, features of two layers and of four offsets.
    "granite4_vision": {
        "text_config": {"num_hidden_layers": 40, **GRANITE},
        "vision_config": siglip(384, patch_size=16),
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
    },
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        "vision_config": {"model_type": "gemma4_vision"},
    },
    "hunyuan_vl": {
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [16, 16, 16, 16],
            },
        },
    },
    "llama4": {"vision_config": {"hidden_size": 1408, "vision_output_dim": 4096}},
    **each("qwen2_5_omni_thinker qwen3_omni_moe_thinker", OMNI),
    # Windows in three of four layers, which have more heads.
    "step3p7": {
        "text_config": {
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 11
            + ["full_attention"],
            "sliding_window": 512,
            "num_sliding_attention_heads": 96,
            "per_layer_config": {i: {"num_attention_heads": 96} for i in range(45) if i % 4},
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    },
    # The default leaves out the indexer that its attention layers need.
    "qwen4_exp": {
        "text_config": {
            **QWEN3_5_ROPE["text_config"],
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 128,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 16,
        }
    },
    "t5gemma2": {
        "encoder": {
            "vision_config": GEMMA3["vision_config"],
            "text_config": {"layer_types": T5GEMMA2_LAYERS, "sliding_window": 512},
        },
        "decoder": {"layer_types": T5GEMMA2_LAYERS, "sliding_window": 512},
    },
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 1024,
                "img_size": [448, 448],
                "depth": 23,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [32, 32],
            },
        },
        "projector_pooling_ratio": 2,
    },
    # TrOCR: the default pairs ViT with BERT, of which no checkpoint reads images.
    "vision-encoder-decoder": {
        "encoder": {"image_size": 384, "qkv_bias": False},
        "decoder": {
            "model_type": "trocr",
            "d_model": 1024,
            "decoder_layers": 12,
            "decoder_attention_heads": 16,
            "decoder_ffn_dim": 4096,
            "cross_attention_hidden_size": 768,
            "is_decoder": True,
            "add_cross_attention": True,
        },
        "decoder_start_token_id": 2,
    },
    # The visual vocabulary's embeddings are the text model's size.
    "ovis2": {"hidden_size": 4096},
}

FOUR_TOKENS = {"image_seq_length": 4}  # a tile of 4 x 4 patches, after the pixel shuffle
SAM = {"image_size": 128, "window_size": 3, "output_channels": 32}  # 8 x 8 patches, 2 x 2 tokens
SAM_CHECKPOINT = {"vision_config": SAM, "image_seq_length": 4}

CODES = 64  # discrete image tokens
VISUAL_TOKENS = {  # the name of a discrete image token
    "chameleon": lambda code: (
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"
    ),
    "emu3": lambda code: f"<|visual token {code:06d}|>",
}

TINY: dict[str, dict[str, Any]] = {
    # `embed_dim` is the encoder's size and `hidden_size` the text model's.
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    # Five layers' features side by side.
    "vipllava": {
        "vision_config": {"num_hidden_layers": 5},
        "vision_feature_layer": [-2, -3, -4, -5, 2],
    },
    **each("internvl qianfan_ocr", FOUR_TOKENS),
    **each("got_ocr2 pp_chart2table", SAM_CHECKPOINT),
    # Images are 490 or 980 pixels in code, so patches grow: 7 x 7 or 14 x 14 of them.
    "aria": {
        "vision_config": {"image_size": 980, "patch_size": 70},
        "projector_patch_to_query_dict": {49: 8, 196: 16},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM | {"image_size": 256, "mlp_dim": 128}},
    **each("gemma3 shieldgemma2", {"mm_tokens_per_image": 4}),
    "gemma4": {"vision_config": {"position_embedding_size": 256}},
    "paligemma": {"text_config": {"num_image_tokens": 16}},
    # Two intermediate layers and the last, side by side.
    "mllama": {"vision_config": {"num_global_layers": 2, "vision_output_dim": 3 * 96}},
    # Four stages: 32, 16, 8 and 4 positions a side; windows do not divide them, as published.
    "florence2": {
        "vision_config": {
            "depths": [1, 1, 2, 1],
            "embed_dim": [32, 48, 64, 96],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "window_size": 3,
        }
    },
    "kosmos-2": {"latent_query_num": 64},  # a constant of its processor
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 16]}},
    # The convolutions' layers, and feed-forward sizes that are not rounded up to 256.
    "lfm2": {"full_attn_idxs": [2], "block_multiple_of": 32},
    "lfm2_vl": {"text_config": {"full_attn_idxs": [2], "block_multiple_of": 32}},
    "chameleon": {"vq_config": {"num_embeddings": CODES, "resolution": 64, "embed_dim": 32}},
    "emu3": {"vq_config": {"codebook_size": CODES, "hidden_size": 4 * 32}},  # widest stage
    # Q-Formers have heads of 64; six text layers, each of which takes in one set of features.
    "granite4_vision": {
        "text_config": {"num_hidden_layers": 6},
        "vision_config": {"hidden_size": 128, "image_size": 128},
        "image_grid_pinpoints": [[128, 256], [256, 128], [256, 256], [384, 128], [128, 384]],
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-2, 1], [-1, 0]],
        "spatial_target_layers": [2, 3, 4, 5],
    },
    # 8 x 8 patches a tile: 4 tokens, or 16 on the fine route.
    "granite_docling": {"vision_config": {"image_size": 128}},
    "diffusion_gemma": {
        "canvas_length": 32,
        "vision_config": {"position_embedding_size": 256},
    },
    "gemma4_unified": {"vision_config": {"mm_posemb_size": 256}},
    **each("hunyuan_vl hy_v4_vl", {"vision_config": {"max_image_size": 128}}),
    "kosmos-2.5": {"vision_config": {"max_num_patches": 64}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"window_size": 3, "downsample_channels": [64, 96]}}
    },
    "janus": {"vq_config": {"num_embeddings": 64, "latent_channels": 32, "num_patches": 4}},
    # The pixel shuffle's output is the projector's input.
    "llama4": {
        "vision_config": {
            "intermediate_size": 4 * 96,
            "projector_input_dim": 128,
            "projector_output_dim": 128,
            "vision_output_dim": 128,
        }
    },
    **each("minicpm_ocr minicpmv4_6 minicpmv4_7", {"vision_config": {"image_size": 128}}),
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_glimmer": {"out_hidden_size": 4 * 96},  # four patches side by side
    "muse_spark": {
        "out_hidden_size": 4 * 96,
        "audio_config": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
    },
    # 8 x 8 patches, and 4 x 4 a tile; convolutions keep one token of 4 x 4.
    "step3p7": {
        "text_config": {
            "num_sliding_attention_heads": 6,
            "per_layer_config": {i: {"num_attention_heads": 6} for i in (1, 2, 3)},
        },
        "vision_config": {"image_size": 112, "max_position_embeddings": 64},
    },
    "perception_lm": {
        "vision_config": {
            "model_args": {
                "embed_dim": 96,
                "num_heads": 4,
                "img_size": [56, 56],
                "depth": 3,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [4, 4],
            }
        }
    },
    "pp_formulanet": {
        "vision_config": SAM
        | {
            "post_conv_in_channels": 32,
            "post_conv_mid_channels": 48,
            "post_conv_out_channels": 64,
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "ple_embed_dim": 64,
            "ngram_vocab_size_base": 256,
            "hc_lowrank": 16,
        }
    },
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 96]}}},
    "fast_vlm": {
        "vision_config": {
            "hidden_size": 256,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [8, 16, 32, 64, 128],
            },
        }
    },
    "vision-encoder-decoder": {"encoder": {"hidden_size": 96}},
    # Discrete image tokens, then audio's, at the end of the vocabulary.
    "apertus1p5": {
        "image_token_offset": 288,
        "audio_token_offset": 336,
        "vision_config": {
            "codebook_size": 48,
            "embed_dim": 32,
            "latent_channels": 32,
            "resolution": 64,
        },
        "audio_config": {"codebook_size": 48, "codebook_dim": 96, "num_filters": 8},
    },
    # The encoder is as wide as the decoder.
    "pix2struct": {"vision_config": {"hidden_size": 64, "seq_len": 64}},
    # The first layers are sparse. Image and audio tokens have no per-layer embeddings; theirs come
    # from vocabularies of their own. The encoder's 2048 channels and 16 x 16 outputs are constants.
    "gemma3n": {
        "text_config": {
            "activation_sparsity_pattern": [0.95] * 5 + [0.0] * 5,
            "vocab_size_per_layer_input": 262,
        },
        "vision_config": {
            "hidden_size": 2048,
            "vocab_offset": 262,
            "vocab_size": 2,
            "model_args": {"channel_multiplier": 0.03},
        },
        "audio_config": {
            "vocab_offset": 264,
            "vocab_size": 2,
            "sscp_conv_channel_size": [16, 8],
        },
    },
    # Fewer K/V heads in full attention, as published.
    "inkling_mm_model": {"text_config": {"num_key_value_heads": 1}},
    # Experts grow in number from layer to layer, after dense layers.
    "dots3_note": {
        "vision_config": {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "per_layer_config": {2: {"num_local_experts": 4}},
        }
    },
}
