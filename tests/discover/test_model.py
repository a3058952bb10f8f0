"""What is found of a checkpoint: ports, attention, positions, modules; what is refused, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.contract import Attention, Computed, Contract, Rule
from glmcompile.errors import CheckpointError, UnsupportedArchitectureError
from glmcompile.rules import GRID_RULES
from tests.checkpoints import (
    VOCAB_SIZE,
    text_config,
    token_id,
    write_checkpoint,
    write_text_checkpoint,
)
from tests.contracts import decoder_ports

Checkpoints = Callable[[str], Checkpoint]
IMAGE_MODELS = ("glm4v", "qwen2_vl")

WIDE = Attention(heads=4, kv_heads=2, head_size=32, value_size=32)
NARROW = Attention(heads=3, kv_heads=1, head_size=32, value_size=32)
ENCODER = Attention(heads=4, kv_heads=4, head_size=16, value_size=16)

POSITIONS = Computed(Rule("patch_positions", {"spatial_merge_size": 2}), ("position_ids",))
SEGMENTS = Computed(Rule("segment_boundaries"), ("cu_seqlens",))
TAPS = Computed(
    Rule(
        "position_taps",
        {
            "num_grid_per_side": 6,
            "mode": "bicubic",
            "align_corners": False,
            "padding": "border",
            "spatial_merge_size": 2,
        },
    ),
    ("position_cells", "position_weights"),
)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "architecture", "hidden", "layer", "positions", "ends"),
    [
        ("glm4v", "Glm4vForConditionalGeneration", 128, WIDE, "mrope", (256, 260, 262)),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", 128, WIDE, "mrope", (258,)),
        ("llama", "LlamaForCausalLM", 96, NARROW, "counted", (258,)),
    ],
)
def test_the_decoder(
    checkpoint_of: Checkpoints,
    name: str,
    architecture: str,
    hidden: int,
    layer: Attention,
    positions: str,
    ends: tuple[int, ...],
) -> None:
    model = checkpoint_of(name).model
    assert model.architecture == architecture
    assert (model.hidden_size, model.vocab_size, model.context_length) == (hidden, 288, 2048)
    assert model.attention == (layer, layer)
    arguments = {"merge_size": 2} if positions == "mrope" else {}
    assert model.positions == Rule(positions, arguments)
    assert model.position_axes == (3 if positions == "mrope" else 1)
    assert model.eos_token_ids == ends
    assert model.spans is None
    features = 0 if name == "llama" else 128
    expected = decoder_ports((layer, layer), model.position_axes, features)
    assert model.decoder.inputs == expected.inputs
    [logits] = model.decoder.outputs
    assert (logits.name, logits.shape) == ("logits", ("rows", 288))


@pytest.mark.parametrize(
    ("name", "computed"),
    [("glm4v", (POSITIONS, SEGMENTS, TAPS)), ("qwen2_vl", (POSITIONS, SEGMENTS))],
)
def test_the_vision_encoder(
    checkpoint_of: Checkpoints, name: str, computed: tuple[Computed, ...]
) -> None:
    model = checkpoint_of(name).model
    vision = model.vision
    assert vision is not None
    token = {"glm4v": "<|image|>", "qwen2_vl": "<|image_pad|>"}[name]
    assert (vision.placeholder, vision.token_id) == (token, token_id(name, token))
    assert vision.computed == computed
    assert vision.attention == (ENCODER, ENCODER)
    ports = {port.name: (port.role, port.dtype, port.shape) for port in model.encoder.inputs}
    expected = {
        "pixel_values": ("processed", "float32", ("patches", 3 * 2 * 14 * 14)),
        "position_ids": ("computed", "int64", ("patches", 2)),
        "cu_seqlens": ("computed", "int32", ("segments_plus_1",)),
    }
    if name == "glm4v":
        expected["position_cells"] = ("computed", "int64", ("patches", 16))
        expected["position_weights"] = ("computed", "float32", ("patches", 16))
    assert ports == expected
    [features] = model.encoder.outputs
    assert (features.name, features.shape) == ("image_features", ("image_tokens", 128))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_rules_name_functions_that_exist(checkpoint_of: Checkpoints, name: str) -> None:
    vision = checkpoint_of(name).model.vision
    assert vision is not None
    assert {each.rule.name for each in vision.computed} <= set(GRID_RULES)


@pytest.mark.parametrize(
    ("name", "frames", "grows"), [("glm4v", True, True), ("qwen2_vl", False, False)]
)
def test_the_processors_settings(
    checkpoint_of: Checkpoints, name: str, frames: bool, grows: bool
) -> None:
    vision = checkpoint_of(name).model.vision
    assert vision is not None
    assert vision.processor.name == "patches"
    settings = vision.processor.arguments
    assert settings["bounds_count_frames"] == frames
    assert settings["grows_small"] == grows
    assert (settings["min_pixels"], settings["max_pixels"]) == (56 * 56, 28 * 28 * 64)
    sides = (settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"])
    assert sides == (14, 2, 2)


def test_where_the_modules_are(checkpoint_of: Checkpoints, family_name: str) -> None:
    structure = checkpoint_of(family_name).structure
    text = "model" if family_name == "llama" else "model.language_model"
    assert structure.table == f"{text}.embed_tokens"
    assert structure.head == "lm_head"
    assert structure.layers["decoder"] == [f"{text}.layers.0", f"{text}.layers.1"]
    assert structure.takes_positions
    if family_name == "llama":
        assert set(structure.layers) == {"decoder"}
    else:
        assert structure.layers["vision_encoder"] == [
            "model.visual.blocks.0",
            "model.visual.blocks.1",
        ]
        assert list(structure.fixed) == ["image_grid_thw"]
    assert structure.uniform == frozenset(structure.layers)
    for component, layers in structure.layers.items():
        assert set(layers) <= structure.called[component]
    assert structure.table in structure.called["decoder"]


def test_a_contract_that_was_found_survives_json(
    checkpoint_of: Checkpoints, family_name: str
) -> None:
    model = checkpoint_of(family_name).model
    written = json.loads(json.dumps(model.to_json()))
    again = Contract.from_json(written)
    assert json.loads(json.dumps(again.to_json())) == written
    assert again.components == model.components


def test_eos_tokens_come_from_the_generation_config_first(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy"))
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert open_checkpoint(copy).model.eos_token_ids == (3,)


def test_processor_settings_of_both_transformers_versions_are_read(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("qwen2_vl"), tmp_path / "copy"))
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    del settings["size"]
    found = []
    for bounds in (
        {"min_pixels": 6272, "max_pixels": 62720},
        {"size": {"shortest_edge": 6272, "longest_edge": 62720}},
    ):
        (copy / "preprocessor_config.json").write_text(json.dumps(settings | bounds))
        vision = open_checkpoint(copy).model.vision
        assert vision is not None
        found.append(vision.processor.arguments)
    assert found[0] == found[1]
    assert (found[0]["min_pixels"], found[0]["max_pixels"]) == (6272, 62720)


def test_windows_of_layers(tmp_path: Path) -> None:
    fields = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    config = text_config("Qwen2", use_sliding_window=True, **fields)
    checkpoint = open_checkpoint(write_text_checkpoint(config, tmp_path))
    assert [each.window for each in checkpoint.model.attention] == [24, 0]
    assert checkpoint.structure.uniform == frozenset()


def test_layers_of_one_window_are_alike(tmp_path: Path) -> None:
    config = text_config("Mistral", sliding_window=24)
    checkpoint = open_checkpoint(write_text_checkpoint(config, tmp_path))
    assert [each.window for each in checkpoint.model.attention] == [24, 24]
    assert checkpoint.structure.uniform == {"decoder"}


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=2, n_head=4)
    config.seq_length = 256
    config.architectures = ["BloomForCausalLM"]
    return config


def rwkv() -> Any:
    config = transformers.RwkvConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64
    )
    config.architectures = ["RwkvForCausalLM"]
    return config


def bert() -> Any:
    config = text_config("Bert", is_decoder=False)
    config.architectures = ["BertLMHeadModel"]
    return config


@pytest.mark.parametrize(
    ("config", "why"),
    [
        pytest.param(
            lambda: text_config("Llama4Text", attention_chunk_size=32, num_local_experts=2),
            r"Llama4TextAttention needs the mask chunked_overlay",
            id="a mask that is not known",
        ),
        pytest.param(
            bert, r"BertSelfAttention needs attention to later tokens", id="an encoder's attention"
        ),
        pytest.param(
            bloom,
            r"BloomForCausalLM cannot be compiled: transformer\.h\.0 \(BloomBlock\) keeps "
            r"something from token to token outside transformers' attention interface",
            id="attention of its own",
        ),
        pytest.param(
            rwkv,
            r"RwkvForCausalLM cannot be compiled: no layer calls transformers' attention interface",
            id="no attention",
        ),
    ],
)
def test_a_decoder_that_cannot_be_compiled_is_refused(
    tmp_path: Path, config: Callable[[], Any], why: str
) -> None:
    built = config()
    if built.model_type == "llama4_text":
        built.architectures = ["Llama4ForCausalLM"]
    directory = write_text_checkpoint(built, tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=why):
        open_checkpoint(directory)


def test_a_context_of_no_tokens_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy"))
    edit_json(copy / "config.json", max_position_embeddings=0)
    with pytest.raises(CheckpointError, match="max_position_embeddings is 0, expected at least 1"):
        open_checkpoint(copy)


def test_positions_of_no_known_rule_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    rope_index = Qwen2VLModel.get_rope_index

    def shifted(self: Any, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions, delta = rope_index(self, *arguments, **named)
        return positions + 1, delta

    monkeypatch.setattr(Qwen2VLModel, "get_rope_index", shifted)
    directory = write_checkpoint("qwen2_vl", tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"get_rope_index.* no known rule"):
        open_checkpoint(directory)


def test_a_vision_encoder_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    def broken(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(PatchMerger, "forward", broken)
    directory = write_checkpoint("qwen2_vl", tmp_path)
    refused = r"its vision encoder cannot be run without weights \(RuntimeError: no such thing\)"
    with pytest.raises(UnsupportedArchitectureError, match=refused):
        open_checkpoint(directory)


def test_grids_that_no_rule_explains_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import vision_utils

    boundaries = vision_utils.get_vision_cu_seqlens

    def halved(grid_thw: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return boundaries(grid_thw, *arguments, **named) // 2

    monkeypatch.setattr(vision_utils, "get_vision_cu_seqlens", halved)
    directory = write_checkpoint("qwen2_vl", tmp_path)
    refused = "cu_seqlens: the rule segment_boundaries .*does not give what transformers computes"
    with pytest.raises(UnsupportedArchitectureError, match=refused):
        open_checkpoint(directory)


def test_discovery_reads_no_weight(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family_name: str
) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    assert open_checkpoint(tiny_checkpoint(family_name)).model.vocab_size == VOCAB_SIZE
