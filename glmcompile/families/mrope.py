"""Positions of packed image patches and of M-RoPE decoders, shared by the Qwen-VL and GLM-V kind.

M-RoPE: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any
Resolution", 2024, section 2.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ModelConfig, VisionConfig
from glmcompile.errors import InputError


def mrope_positions(
    token_ids: NDArray[np.int64], grid_thw: NDArray[np.int64], model: ModelConfig
) -> tuple[NDArray[np.int64], int]:
    """Temporal, height and width position of every token: int64 [3, T], and the next position.

    Text counts up on all three axes. An image's tokens start at the running position, each axis
    adding the token's place in the merged grid; text goes on after the image's longest side.
    """
    assert model.vision is not None
    merge = model.vision.merge_size
    is_image = token_ids == model.image_token_id
    merged = grid_thw // np.array([1, merge, merge])
    expected = int(merged.prod(axis=1).sum())
    if int(is_image.sum()) != expected:
        raise InputError(
            f"the prompt has {int(is_image.sum())} image tokens but its {len(grid_thw)} images "
            f"take {expected}; expand each image placeholder to its image's token count"
        )
    positions = np.empty((3, len(token_ids)), dtype=np.int64)
    token = position = 0
    for frames, rows, columns in merged.tolist():
        start = token + int(np.argmax(is_image[token:]))
        stop = start + frames * rows * columns
        if not is_image[start:stop].all():
            raise InputError(
                f"an image's {stop - start} tokens are not adjacent: token {start} of the prompt "
                "starts a shorter run of image tokens"
            )
        text_end = position + start - token
        positions[:, token:start] = np.arange(position, text_end)
        grid = np.indices((frames, rows, columns)).reshape(3, -1)
        positions[:, start:stop] = grid + text_end
        token, position = stop, text_end + max(frames, rows, columns)
    positions[:, token:] = np.arange(position, position + len(token_ids) - token)
    return positions, position + len(token_ids) - token


def patch_positions(grid_thw: NDArray[np.int64], vision: VisionConfig) -> NDArray[np.int64]:
    """Row and column of every patch of every frame: int64 [patches, 2].

    Patches come in the processor's order: merge x merge windows one after another, so that the
    patches merged into one image feature are adjacent.
    """
    merge = vision.merge_size
    blocks = []
    for frames, rows, columns in grid_thw.tolist():
        grid = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
        blocks.append(np.tile(grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (frames, 1)))
    return np.concatenate(blocks).astype(np.int64) if blocks else np.empty((0, 2), np.int64)


def frame_boundaries(grid_thw: NDArray[np.int64]) -> NDArray[np.int32]:
    """cu_seqlens int32 [frames + 1]: attention stays inside one frame of one image."""
    lengths = np.repeat(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
