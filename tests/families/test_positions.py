"""Positions, vision inputs and resizing of every image family equal transformers' own."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vModel, Glm4vVisionEmbeddings
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from glmcompile.config import ModelConfig
from glmcompile.errors import InputError, UnsupportedArchitectureError
from glmcompile.families import Family, family_for, supported
from tests.checkpoints import CONFIGS

MODELS = {"glm4v": Glm4vModel, "qwen2_vl": Qwen2VLModel}
GRIDS = [
    [],
    [(1, 4, 6)],
    [(1, 8, 2), (1, 2, 2), (1, 6, 10)],
    [(1, 2, 20), (1, 2, 20)],
]


def family_and_model(name: str, **changes: object) -> tuple[Family, ModelConfig]:
    config = CONFIGS[name]().to_dict()
    config["text_config" if "text_config" in config else "dtype"] = {
        **(config.get("text_config") or {}),
        **changes,
    }
    family = family_for(config)
    return family, family.model_config(config)


def prompt_with_images(family: Family, model: ModelConfig, grids: list[tuple[int, int, int]]):
    ids = [1, 2, 3]
    for grid in grids:
        ids += [7] + [model.image_token_id] * family.image_tokens(grid, model.vision) + [8, 9]
    return np.array(ids)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_mrope_positions_equal_transformers(name: str, grids: list[tuple[int, int, int]]) -> None:
    family, model = family_and_model(name)
    ids = prompt_with_images(family, model, grids)
    reference = SimpleNamespace(config=CONFIGS[name]())
    reference.get_vision_position_ids = MODELS[name].get_vision_position_ids.__get__(reference)
    expected, delta = MODELS[name].get_rope_index(
        reference,
        torch.from_numpy(ids)[None],
        torch.from_numpy((ids == model.image_token_id).astype(np.int32))[None],
        image_grid_thw=torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
    )
    positions, next_position = family.position_ids(ids, grids, model)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert positions.dtype == np.int64
    assert next_position == len(ids) + int(delta)


@pytest.mark.parametrize("name", MODELS)
def test_image_tokens_must_match_the_grids(name: str) -> None:
    family, model = family_and_model(name)
    ids = prompt_with_images(family, model, [(1, 4, 4)])
    with pytest.raises(InputError, match="4 image tokens but its 1 images take 6"):
        family.position_ids(ids, [(1, 4, 6)], model)
    split = np.insert(ids, 6, 1)
    with pytest.raises(InputError, match="not adjacent"):
        family.position_ids(split, [(1, 4, 4)], model)


def test_text_positions_count_tokens() -> None:
    family, model = family_and_model("llama")
    positions, next_position = family.position_ids([5, 6, 7], [], model)
    np.testing.assert_array_equal(positions, [[0, 1, 2]])
    assert next_position == 3


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 2, 2), (3, 4, 8), (1, 6, 2)]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_vision_inputs_equal_transformers(name: str, grids: list[tuple[int, int, int]]) -> None:
    family, model = family_and_model(name)
    assert family.vision_inputs is not None
    inputs = family.vision_inputs(np.array(grids), model.vision)
    grid_thw = torch.tensor(grids)
    np.testing.assert_array_equal(
        inputs["position_ids"], get_vision_position_ids(grid_thw, 2).numpy()
    )
    np.testing.assert_array_equal(inputs["cu_seqlens"], get_vision_cu_seqlens(grid_thw).numpy())
    assert inputs["cu_seqlens"].dtype == np.int32


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 2, 2), (3, 4, 8), (1, 40, 30)]], ids=str)
def test_position_taps_equal_transformers(grids: list[tuple[int, int, int]]) -> None:
    family, model = family_and_model("glm4v")
    assert family.vision_inputs is not None
    inputs = {
        name: torch.from_numpy(value)
        for name, value in family.vision_inputs(np.array(grids), model.vision).items()
    }
    embeddings = Glm4vVisionEmbeddings(CONFIGS["glm4v"]().vision_config)
    table = embeddings.position_embedding.weight
    frames = torch.tensor([(1, rows, columns) for t, rows, columns in grids for _ in range(t)])
    expected = embeddings(
        torch.zeros(len(inputs["position_ids"]), table.shape[1]),
        inputs["cu_seqlens"].diff(),
        frames,
        *inputs["position_ids"].T,
    )
    actual = torch.nn.functional.embedding_bag(
        inputs["position_cells"], table, per_sample_weights=inputs["position_weights"], mode="sum"
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "size", [(1, 1), (20, 500), (480, 640), (2400, 1080), (31, 33), (4000, 6000), (27, 29)]
)
@pytest.mark.parametrize("name", MODELS)
def test_resize_equals_transformers(name: str, size: tuple[int, int]) -> None:
    family, model = family_and_model(name)
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    vision = model.vision
    arguments = {
        "height": size[0],
        "width": size[1],
        "factor": vision.patch_size * vision.merge_size,
        "min_pixels": vision.processor.min_pixels,
        "max_pixels": vision.processor.max_pixels,
    }
    if name == "glm4v":
        arguments |= {"num_frames": vision.temporal_patch_size}
    assert family.resize is not None
    assert family.resize(*size, vision) == module.smart_resize(**arguments)


@pytest.mark.parametrize("name", MODELS)
def test_resize_refuses_a_sliver(name: str) -> None:
    family, model = family_and_model(name)
    assert family.resize is not None
    with pytest.raises(InputError, match="60x12300"):
        family.resize(12300, 60, model.vision)


def test_text_model_refuses_images() -> None:
    family, model = family_and_model("llama")
    with pytest.raises(InputError, match="text only"):
        family.position_ids([1], [(1, 2, 2)], model)


def test_unsupported_architecture_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"BertModel.*Glm4vFor.*LlamaFor"):
        family_for({"architectures": ["BertModel"]})
    with pytest.raises(UnsupportedArchitectureError, match="names no architecture"):
        family_for({})
    with pytest.raises(UnsupportedArchitectureError, match="names no architecture"):
        family_for({"architectures": "LlamaForCausalLM"})
    with pytest.raises(UnsupportedArchitectureError, match="is not supported"):
        family_for({"architectures": [["LlamaForCausalLM"]]})


def test_sliding_window_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="sliding-window"):
        family_and_model("qwen2_vl", layer_types=["full_attention", "sliding_attention"])


def test_model_config_survives_json() -> None:
    for name in supported():
        _, model = family_and_model(name)
        assert ModelConfig.from_json(model.to_json()) == model


def test_eos_tokens_come_from_the_generation_config_first() -> None:
    config = CONFIGS["glm4v"]().to_dict()
    family = family_for(config)
    assert family.model_config(config).eos_token_ids == (256, 260, 262)
    assert family.model_config(config, {}, {"eos_token_id": 3}).eos_token_ids == (3,)


def test_processor_settings_of_both_transformers_versions_are_read() -> None:
    config = CONFIGS["qwen2_vl"]().to_dict()
    family = family_for(config)
    old = family.model_config(config, {"min_pixels": 100, "max_pixels": 200}).vision
    new = family.model_config(config, {"size": {"shortest_edge": 100, "longest_edge": 200}}).vision
    assert old == new
    assert (old.processor.min_pixels, old.processor.max_pixels) == (100, 200)
