"""Exported graphs keep the contract: interface, parameter names, one Linear per linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.errors import ExportError
from glmcompile.export import export_component
from glmcompile.export.skeleton import EAGER, build_skeleton
from tests.checkpoints import text_config, write_text_checkpoint

Exported = dict[str, ir.Model]
INT64, INT32, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT


def interface(values: list[ir.Value]) -> dict[str, tuple[ir.DataType, tuple[int | str, ...]]]:
    return {
        str(v.name): (
            v.dtype,
            tuple(str(d.value) if isinstance(d, ir.SymbolicDim) else d for d in v.shape or ()),
        )
        for v in values
    }


def linears(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if (n.domain, n.op_type) == ("com.glmcompile", "Linear")]


@pytest.mark.parametrize("family_name", ["glm4v", "qwen2_vl"])
def test_vision_encoder_interface(exported: Callable[[str], Exported], family_name: str) -> None:
    graph = exported(family_name)["vision_encoder"].graph
    inputs = {
        "pixel_values": (FLOAT, ("patches", 3 * 2 * 14 * 14)),
        "cu_seqlens": (INT32, ("segments_plus_1",)),
        "position_ids": (INT64, ("patches", 2)),
    }
    if family_name == "glm4v":
        inputs["position_cells"] = (INT64, ("patches", 16))
        inputs["position_weights"] = (FLOAT, ("patches", 16))
    assert interface(graph.inputs) == inputs
    assert interface(graph.outputs) == {"image_features": (FLOAT, ("(patches//4)", 128))}


@pytest.mark.parametrize(
    ("family_name", "positions", "cache"),
    [
        ("glm4v", (3, "tokens"), (2, 32)),
        ("qwen2_vl", (3, "tokens"), (2, 32)),
        ("llama", ("tokens",), (1, 32)),
    ],
)
def test_decoder_interface(
    exported: Callable[[str], Exported],
    family_name: str,
    positions: tuple[int | str, ...],
    cache: tuple[int, int],
) -> None:
    graph = exported(family_name)["decoder"].graph
    caches = {
        f"{kind}_cache.{layer}": (FLOAT, ("num_blocks", "block_size", *cache))
        for layer in range(2)
        for kind in ("key", "value")
    }
    images = {
        "image_features": (FLOAT, ("image_tokens", 128)),
        "image_token_indices": (INT64, ("image_tokens",)),
    }
    assert interface(graph.inputs) == {
        "input_ids": (INT64, ("tokens",)),
        **({} if family_name == "llama" else images),
        "position_ids": (INT64, positions),
        "cumulative_sequence_length": (INT32, ("sequences_plus_1",)),
        "past_seqlens": (INT32, ("sequences",)),
        "block_table": (INT32, ("sequences", "max_blocks")),
        "logits_indices": (INT64, ("rows",)),
        **caches,
    }
    assert interface(graph.outputs) == {"logits": (FLOAT, ("rows", 288))}


def test_attention_reads_the_caches_of_its_layer(exported: Callable[[str], Exported]) -> None:
    nodes = [n for n in exported("qwen2_vl")["decoder"].graph if n.op_type == "PagedAttention"]
    for layer, node in enumerate(nodes):
        assert node.domain == "com.microsoft"
        names = [value.name if value else None for value in node.inputs[3:]]
        assert names == [
            f"key_cache.{layer}",
            f"value_cache.{layer}",
            "cumulative_sequence_length",
            "past_seqlens",
            "block_table",
        ]
        assert len(node.outputs) == 1
        assert node.attributes["num_heads"].as_int() == 4
        assert node.attributes["kv_num_heads"].as_int() == 2
        assert node.attributes["scale"].as_float() == pytest.approx(32**-0.5)
    assert len(nodes) == 2


def test_windows_softcap_and_sinks_are_in_the_graph(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention"]
    gemma = text_config(
        "Gemma2",
        head_dim=16,
        sliding_window=32,
        layer_types=layers,
        attn_logit_softcapping=30.0,
        query_pre_attn_scalar=64,
    )
    sinks = text_config(
        "GptOss",
        head_dim=16,
        sliding_window=32,
        layer_types=layers,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    softcapped, with_sinks = (
        paged_attention_nodes(write_text_checkpoint(config, tmp_path / config.model_type))
        for config in (gemma, sinks)
    )
    for nodes in (softcapped, with_sinks):
        windows = [node.attributes.get_int("local_window_size", 0) for node in nodes]
        assert windows == [32, 0]
    assert [node.attributes.get_float("softcap", 0.0) for node in softcapped] == [30.0, 30.0]
    assert [node.attributes.get_float("scale", 0.0) for node in softcapped] == [0.125, 0.125]
    for layer, node in enumerate(with_sinks):
        assert node.inputs[11] is not None
        assert node.inputs[11].name == f"model.layers.{layer}.self_attn.sinks"


def paged_attention_nodes(directory: Path) -> list[ir.Node]:
    decoder = export_component(open_checkpoint(directory), "decoder")
    return [node for node in decoder.graph if node.op_type == "PagedAttention"]


def test_every_linear_layer_is_one_linear_node(
    checkpoint_of: Callable[[str], Checkpoint],
    exported: Callable[[str], Exported],
    family_name: str,
) -> None:
    checkpoint = checkpoint_of(family_name)
    skeleton = build_skeleton(checkpoint, FakeTensorMode(allow_non_fake_inputs=True), EAGER)
    expected = {
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    found = [node for model in exported(family_name).values() for node in linears(model)]
    assert {node.name for node in found} == expected
    assert len(found) == len(expected)
    for node in found:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.is_initializer()
        parameter = f"{node.name}.weight"
        assert weight.name == checkpoint.tied.get(parameter, parameter)
        assert len(weight.shape or ()) == 2
        module = skeleton.get_submodule(str(node.name))
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        assert (len(node.inputs) == 3) == has_bias


def test_no_other_multiplication_by_a_weight_is_left(
    exported: Callable[[str], Exported], family_name: str
) -> None:
    for model in exported(family_name).values():
        for node in model.graph:
            if node.op_type in ("MatMul", "Gemm", "Conv"):
                weights = {v.name for v in node.inputs if v is not None and v.is_initializer()}
                assert not {w for w in weights if str(w).endswith(".weight")}


def test_initializers_are_the_checkpoints_parameters_unchanged(
    checkpoint_of: Callable[[str], Checkpoint],
    exported: Callable[[str], Exported],
    family_name: str,
) -> None:
    checkpoint = checkpoint_of(family_name)
    seen = set()
    for model in exported(family_name).values():
        for name, value in model.graph.initializers.items():
            if name not in checkpoint.parameters:
                continue
            seen.add(name)
            stored = checkpoint.tensor(name).float()
            tensor = torch.from_numpy(value.const_value.numpy().copy())
            if name == "model.visual.downsample.weight":
                stored = stored.permute(0, 2, 3, 1)  # columns in the order of the activations
            assert torch.equal(tensor, stored.reshape(tensor.shape)), name
    assert seen == set(checkpoint.parameters)


def test_graphs_hold_no_copies_of_whole_activations(
    exported: Callable[[str], Exported], family_name: str
) -> None:
    for model in exported(family_name).values():
        operators = {node.op_type for node in model.graph}
        assert not operators & {"Identity", "SplitToSequence", "SequenceAt", "GridSample", "Conv"}
        for node in model.graph:
            if node.op_type == "Reshape":
                target = node.inputs[1]
                assert target is not None
                assert target.const_value is not None


def test_export_reads_no_weight(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    model = export_component(checkpoint_of("qwen2_vl"), "decoder")
    assert "model.language_model.embed_tokens.weight" in model.graph.initializers


def test_skeleton_parameters_have_no_storage(
    checkpoint_of: Callable[[str], Checkpoint], family_name: str
) -> None:
    skeleton = build_skeleton(
        checkpoint_of(family_name), FakeTensorMode(allow_non_fake_inputs=True), EAGER
    )
    assert all(isinstance(p.data, FakeTensor) for p in skeleton.parameters())
    assert not any(isinstance(b, FakeTensor) for b in skeleton.buffers())


def test_unknown_component_is_refused(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(ExportError, match=r"no component vision_encoder.*: decoder$"):
        export_component(checkpoint_of("llama"), "vision_encoder")


def test_failure_names_the_component(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("cannot trace")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ExportError, match=r"decoder: .*LlamaForCausalLM: .*cannot trace"):
        export_component(checkpoint_of("llama"), "decoder")
