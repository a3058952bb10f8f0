"""Positions of a prompt's tokens equal transformers' own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from glmcompile.contract import Contract
from glmcompile.errors import InputError
from glmcompile.rules import position_ids
from tests.checkpoints import CONFIGS
from tests.contracts import image_contract, text_contract

MODELS = {"glm4v": Glm4vModel, "qwen2_vl": Qwen2VLModel}
GRIDS = [
    [],
    [(1, 4, 6)],
    [(1, 8, 2), (1, 2, 2), (1, 6, 10)],
    [(1, 2, 20), (1, 2, 20)],
]
Grids = list[tuple[int, int, int]]


def prompt_with_images(model: Contract, grids: Grids) -> np.ndarray:
    ids = [1, 2, 3]
    for frames, rows, columns in grids:
        ids += [7] + [model.image_token_id or 0] * (frames * rows * columns // 4) + [8, 10]
    return np.array(ids)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_mrope_equals_transformers(name: str, grids: Grids) -> None:
    model = image_contract()
    ids = prompt_with_images(model, grids)
    reference = SimpleNamespace(config=CONFIGS[name]())
    reference.get_vision_position_ids = MODELS[name].get_vision_position_ids.__get__(reference)
    expected, delta = MODELS[name].get_rope_index(
        reference,
        torch.from_numpy(ids)[None],
        torch.from_numpy((ids == model.image_token_id).astype(np.int32))[None],
        image_grid_thw=torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
    )
    positions, next_position = position_ids(model, ids, grids)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert positions.dtype == np.int64
    assert next_position == len(ids) + int(delta)


def test_image_tokens_must_match_the_grids() -> None:
    model = image_contract()
    ids = prompt_with_images(model, [(1, 4, 4)])
    with pytest.raises(InputError, match="4 image tokens but its 1 images take 6"):
        position_ids(model, ids, [(1, 4, 6)])
    with pytest.raises(InputError, match="not adjacent"):
        position_ids(model, np.insert(ids, 6, 1), [(1, 4, 4)])


def test_text_positions_count_tokens() -> None:
    positions, next_position = position_ids(text_contract(), [5, 6, 7], [])
    np.testing.assert_array_equal(positions, [[0, 1, 2]])
    assert positions.dtype == np.int64
    assert next_position == 3


def test_a_model_whose_positions_are_counted_may_have_images() -> None:
    model = image_contract(position_axes=1, positions=text_contract().positions)
    ids = prompt_with_images(model, [(1, 4, 4)])
    positions, next_position = position_ids(model, ids, [(1, 4, 4)])
    np.testing.assert_array_equal(positions, [np.arange(len(ids))])
    assert next_position == len(ids)
