"""Qwen2-VL: M-RoPE decoder, rotary vision encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ImageProcessorConfig, ModelConfig, VisionConfig
from glmcompile.errors import UnsupportedArchitectureError
from glmcompile.families.base import (
    Config,
    Family,
    ModulePaths,
    decoder_fields,
    image_processor_config,
    text_config,
    vision_config,
)
from glmcompile.families.mrope import frame_boundaries, mrope_positions, patch_positions
from glmcompile.families.resize import fit_pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PROCESSOR_DEFAULTS = ImageProcessorConfig(
    min_pixels=56 * 56, max_pixels=28 * 28 * 1280, mean=CLIP_MEAN, std=CLIP_STD
)


def read_config(config: Config, processor: Config, generation: Config) -> ModelConfig:
    """See Family.read_config. Raises UnsupportedArchitectureError for sliding-window layers."""
    if "sliding_attention" in (text_config(config).get("layer_types") or ()):
        raise UnsupportedArchitectureError(
            "this Qwen2-VL checkpoint has sliding-window attention layers (use_sliding_window); "
            "only full attention is supported"
        )
    vision = config["vision_config"]
    return ModelConfig(
        family="qwen2_vl",
        **decoder_fields(config, generation),
        position_axes=3,
        image_token_id=config["image_token_id"],
        vision=vision_config(
            vision,
            image_processor_config(processor, PROCESSOR_DEFAULTS),
            width=vision["embed_dim"],
            output_size=vision["hidden_size"],
        ),
    )


def vision_inputs(grid_thw: NDArray[np.int64], vision: VisionConfig) -> dict[str, NDArray[Any]]:
    """position_ids int64 [patches, 2] and cu_seqlens int32 [frames + 1]."""
    return {
        "position_ids": patch_positions(grid_thw, vision),
        "cu_seqlens": frame_boundaries(grid_thw),
    }


FAMILY = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    modules=ModulePaths(
        vision="model.visual",
        embed_tokens="model.language_model.embed_tokens",
        decoder="model.language_model",
    ),
    read_config=read_config,
    positions=mrope_positions,
    vision_inputs=vision_inputs,
    resize=fit_pixels,
    image_placeholder="<|image_pad|>",
)
