"""Sequences without a model behind them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence as Items

import numpy as np

from glmcompile.runtime.image_processor import PatchImage
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.runtime.sequence import ImageSpan, Sequence

_ids = itertools.count()


def image_span(start: int, num_tokens: int, content: bytes) -> ImageSpan:
    """An image known by its content alone."""
    image = PatchImage(
        np.zeros((1, 1, 3), np.uint8), (1, 1, 1), hashlib.sha256(content).digest(), processor=None
    )
    return ImageSpan(start, num_tokens, image)


def sequence(tokens: Items[int], max_tokens: int = 100, images: Items[ImageSpan] = ()) -> Sequence:
    return Sequence(
        id=next(_ids),
        token_ids=list(tokens),
        params=SamplingParams(),
        positions=np.arange(len(tokens))[None],
        position_offset=0,
        max_tokens=max_tokens,
        images=tuple(images),
    )
