"""Position ids of a prompt's tokens.

M-RoPE: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any
Resolution", 2024, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.contract import Contract
from glmcompile.errors import InputError

Integers = NDArray[np.int64]


def counted(
    ids: Integers, grids: Integers, image_token_id: int | None, first: int = 0
) -> tuple[Integers, int]:
    """One axis that counts the tokens. first: where it begins; PaliGemma's counts from 1."""
    return np.arange(first, first + len(ids), dtype=np.int64)[None], first + len(ids)


def mrope(
    ids: Integers, grids: Integers, image_token_id: int | None, merge_size: int
) -> tuple[Integers, int]:
    """Temporal, height and width position of every token.

    Text counts up on all three axes. An image's tokens start at the running position, each axis
    adding the token's place in the merged grid; text goes on after the image's longest side.
    """
    is_image = ids == image_token_id
    merged = grids // np.array([1, merge_size, merge_size])
    expected = int(merged.prod(axis=1).sum())
    if int(is_image.sum()) != expected:
        raise InputError(
            f"the prompt has {int(is_image.sum())} image tokens but its {len(grids)} images "
            f"take {expected}; expand each image placeholder to its image's token count"
        )
    positions = np.empty((3, len(ids)), dtype=np.int64)
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
    positions[:, token:] = np.arange(position, position + len(ids) - token)
    return positions, position + len(ids) - token


POSITION_RULES: dict[str, Callable[..., tuple[Integers, int]]] = {
    "counted": counted,
    "mrope": mrope,
}


def position_ids(
    contract: Contract, token_ids: Sequence[int] | Integers, grid_thw: Any
) -> tuple[Integers, int]:
    """Position ids int64 [position_axes, T] of a whole prompt and the next token's position.

    grid_thw: [images, 3] (frames, patch rows, patch columns), in the order of the prompt; empty
    where a model's positions do not depend on them.
    Tokens generated after the prompt take next, next + 1, ... on every axis.
    Raises InputError when the image tokens do not match the grids.
    """
    rule = contract.positions
    grids = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
    ids = np.asarray(token_ids, dtype=np.int64)
    return POSITION_RULES[rule.name](ids, grids, contract.image_token_id, **rule.arguments)
