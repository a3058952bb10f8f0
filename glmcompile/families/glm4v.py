"""GLM-4V (GLM-4.1V-9B, AutoGLM-Phone-9B): M-RoPE decoder, interpolated position embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ImageProcessorConfig, ModelConfig, VisionConfig
from glmcompile.families.base import (
    Config,
    Family,
    ModulePaths,
    decoder_fields,
    image_processor_config,
    vision_config,
)
from glmcompile.families.bicubic import patch_taps
from glmcompile.families.mrope import frame_boundaries, mrope_positions, patch_positions
from glmcompile.families.qwen2_vl import CLIP_MEAN, CLIP_STD
from glmcompile.families.resize import fit_pixels

PROCESSOR_DEFAULTS = ImageProcessorConfig(
    min_pixels=112 * 112, max_pixels=28 * 28 * 15000, mean=CLIP_MEAN, std=CLIP_STD
)


def read_config(config: Config, processor: Config, generation: Config) -> ModelConfig:
    """See Family.read_config."""
    vision = config["vision_config"]
    return ModelConfig(
        family="glm4v",
        **decoder_fields(config, generation),
        position_axes=3,
        image_token_id=config["image_token_id"],
        vision=vision_config(
            vision,
            image_processor_config(processor, PROCESSOR_DEFAULTS),
            width=vision["hidden_size"],
            output_size=vision["out_hidden_size"],
            position_grid=vision["image_size"] // vision["patch_size"],
        ),
    )


def vision_inputs(grid_thw: NDArray[np.int64], vision: VisionConfig) -> dict[str, NDArray[Any]]:
    """position_ids int64 [patches, 2], cu_seqlens int32 [frames + 1], and what each patch takes of
    the position embedding: position_cells int64 and position_weights float32 [patches, 16].
    """
    assert vision.position_grid is not None
    positions = patch_positions(grid_thw, vision)
    cells, weights = patch_taps(grid_thw, positions, vision.position_grid)
    return {
        "position_ids": positions,
        "cu_seqlens": frame_boundaries(grid_thw),
        "position_cells": cells,
        "position_weights": weights,
    }


def resize(height: int, width: int, vision: VisionConfig) -> tuple[int, int]:
    """Height and width divisible by a merged patch, total pixels of all frames within bounds.

    As `smart_resize` of transformers' GLM-4V image processor: images smaller than a merged patch
    grow first, and the bounds count the temporal patch's frames (an image is repeated to fill one).
    """
    factor = vision.patch_size * vision.merge_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return fit_pixels(height, width, vision, frames=vision.temporal_patch_size)


FAMILY = Family(
    name="glm4v",
    architectures=("Glm4vForConditionalGeneration",),
    modules=ModulePaths(
        vision="model.visual",
        embed_tokens="model.language_model.embed_tokens",
        decoder="model.language_model",
    ),
    read_config=read_config,
    positions=mrope_positions,
    vision_inputs=vision_inputs,
    resize=resize,
    image_placeholder="<|image|>",
)
