"""Layouts that transformers converts are read as transformers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from glmcompile.checkpoint import StoredTensor, open_checkpoint
from glmcompile.checkpoint.conversions import Conversion, Converted, complete, parameters_of
from glmcompile.checkpoint.safetensors_files import stored_tensors
from glmcompile.checkpoint.sources import WeightFiles
from glmcompile.errors import CheckpointError

EXPERTS = 12  # two digits, so that their order is no order of letters


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


def meta(config: transformers.PreTrainedConfig, name: str) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return getattr(transformers, name)._from_config(config)


def test_split_experts_are_merged(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    stored = stored_tensors(tmp_path)
    assert f"model.layers.1.mlp.experts.{EXPERTS - 1}.gate_proj.weight" in stored
    conversion = Conversion(meta(config, "Qwen3MoeForCausalLM"))
    found, tied = complete(parameters_of(stored, conversion), conversion, tmp_path)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    files = WeightFiles()
    assert tied == {}
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name].read(files), value), name
    fused = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(fused, Converted)
    assert fused.files == (tmp_path / "model.safetensors",) * (2 * EXPERTS)
    assert torch.equal(torch.cat(list(fused.rows(files, 5))), fused.read(files))
    assert isinstance(found["model.layers.1.mlp.gate.weight"], StoredTensor)


def test_experts_of_the_wrong_width_are_named(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    key = "model.layers.0.mlp.experts.1.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(20, 32)}))
    conversion = Conversion(meta(config, "Qwen3MoeForCausalLM"))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj.*cannot be converted to"):
        parameters_of(stored_tensors(tmp_path), conversion)


def test_fused_projections_are_split_and_renamed(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama")
    tensors = load_file(path / "model.safetensors")
    expected = open_checkpoint(path)
    prefix = "model.layers.0.mlp."
    gate, up = (tensors.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
    tensors["model.layers.0.feed_forward.gate_up.weight"] = torch.cat([gate, up])
    key = f"{prefix}down_proj.weight"
    tensors["model.layers.0.feed_forward.down_t.weight"] = tensors.pop(key).T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    transforms = [
        WeightRenaming(r"\.feed_forward\.", ".mlp."),
        WeightConverter("gate_up.weight", ["gate_proj.weight", "up_proj.weight"], [Chunk(0)]),
        WeightConverter("down_t.weight", "down_proj.weight", [Transpose()]),
    ]
    conversion = Conversion(meta(expected.config, "LlamaForCausalLM"), transforms)
    found = parameters_of(stored_tensors(tmp_path), conversion)
    found, tied = complete(found, conversion, tmp_path)
    assert tied == expected.tied
    for name in expected.parameters:
        assert torch.equal(found[name].read(WeightFiles()), expected.tensor(name)), name


def test_a_head_is_tied_to_an_embedding_that_is_converted(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)

    def split(tensors: dict[str, torch.Tensor]) -> None:
        for index, part in enumerate(tensors.pop("model.embed_tokens.weight").chunk(4)):
            tensors[f"model.embed.{index}.weight"] = part

    edit_tensors(tmp_path, split)
    transforms = [
        WeightConverter(
            "embed.*.weight", "embed_tokens.weight", [MergeModulelist(), _Flatten(dim=0)]
        )
    ]
    conversion = Conversion(meta(config, "LlamaForCausalLM"), transforms)
    _, tied = complete(parameters_of(stored_tensors(tmp_path), conversion), conversion, tmp_path)
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


class _Flatten(Concatenate):
    def convert(self, input_dict, source_patterns, target_patterns, **ignored):  # type: ignore[no-untyped-def]
        (value,) = input_dict.values()
        return {target_patterns[0]: value.flatten(0, 1)}


def test_older_names_of_an_image_model(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("qwen2_vl")
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    older = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in tensors.items()
    }
    save_file(older, copy / "model.safetensors")
    expected = open_checkpoint(path)
    found = open_checkpoint(copy)
    assert found.parameters.keys() == expected.parameters.keys()
    for name in expected.parameters:
        assert torch.equal(found.tensor(name), expected.tensor(name))


def test_float8_without_a_word_of_it_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy"))
    key = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(copy, lambda all: all.update({key: all[key].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"up_proj.*float8_e4m3fn.*quantization_config"):
        open_checkpoint(copy)
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
