"""Rewrites leave the results of real exported graphs as they are and ensure what they promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from glmcompile.checkpoint import open_checkpoint
from glmcompile.export import export_component
from glmcompile.passes import simplify
from glmcompile.passes.fuse_epilogue import FuseEpilogue
from glmcompile.passes.merge_linears import merged_name
from glmcompile.passes.pack_attention import PackAttention


@pytest.fixture(scope="module")
def simplified(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str, str], ir.Model]:
    """(family, component) -> a fresh copy of the simplified model."""
    made: dict[tuple[str, str], ir.Model] = {}

    def model(family: str, component: str) -> ir.Model:
        if (family, component) not in made:
            made[family, component] = export_component(
                open_checkpoint(tiny_checkpoint(family)), component
            )
            simplify(made[family, component])
        return made[family, component].clone()

    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl"])
def test_every_rotation_is_one_operator(
    simplified: Callable[[str, str], ir.Model], family: str, component: str
) -> None:
    counts = operators(simplified(family, component))
    attentions = counts["PagedAttention"] + counts["VarlenAttention"]
    assert counts["RotaryEmbedding"] == 2 * attentions
    assert counts["Neg"] == 0


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl"])
def test_vision_encoders_read_angles_where_they_lie(
    simplified: Callable[[str, str], ir.Model], family: str
) -> None:
    assert not operators(simplified(family, "vision_encoder")).keys() & {
        "Concat",
        "Gather",
        "Slice",
    }


def test_glm4v_rotates_neighbours_and_llama_halves(
    simplified: Callable[[str, str], ir.Model],
) -> None:
    for family, interleaved in (("glm4v", 1), ("llama", 0)):
        nodes = [n for n in simplified(family, "decoder").graph if n.op_type == "RotaryEmbedding"]
        assert {node.attributes["interleaved"].as_int() for node in nodes} == {interleaved}


def test_no_two_linear_layers_read_the_same_input(
    simplified: Callable[[str, str], ir.Model], family_name: str
) -> None:
    linears = [n for n in simplified(family_name, "decoder").graph if n.op_type == "Linear"]
    inputs = [node.inputs[0] for node in linears]
    assert len(set(inputs)) == len(inputs)
    assert any("q_proj+k_proj+v_proj" in (node.name or "") for node in linears)


def test_a_merged_weight_is_its_parts_in_order(
    simplified: Callable[[str, str], ir.Model], tiny_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    prefix = "model.layers.0.self_attn."
    parts = [checkpoint.tensor(f"{prefix}{each}_proj.weight").float() for each in "qkv"]
    merged = simplified("llama", "decoder").graph.initializers[
        f"{prefix}q_proj+k_proj+v_proj.weight"
    ]
    assert merged.const_value is not None
    array = merged.const_value.numpy()
    assert array.shape[0] == sum(len(part) for part in parts)
    assert (array[: len(parts[0])] == parts[0].numpy()).all()
    assert (array[-len(parts[2]) :] == parts[2].numpy()).all()


def test_norms_are_one_operator(
    simplified: Callable[[str, str], ir.Model], family_name: str
) -> None:
    counts = operators(simplified(family_name, "decoder"))
    assert counts["RMSNormalization"] >= 2 * counts["PagedAttention"]
    assert counts["ReduceMean"] == counts["Pow"] == 0


def test_attention_reads_the_projection_through_one_node(
    simplified: Callable[[str, str], ir.Model], family_name: str
) -> None:
    model = simplified(family_name, "decoder")
    PackAttention()(model)
    counts = operators(model)
    assert counts["PackedRotary"] == counts["PagedAttention"] > 0
    assert counts["RotaryEmbedding"] == 0
    attention = next(node for node in model.graph if node.op_type == "PagedAttention")
    assert attention.inputs[1] is None
    assert attention.inputs[2] is None


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl"])
def test_vision_attention_gets_its_parts_from_one_node(
    simplified: Callable[[str, str], ir.Model], family: str
) -> None:
    model = simplified(family, "vision_encoder")
    PackAttention()(model)
    for node in model.graph:
        if node.op_type == "VarlenAttention":
            sources = {value.producer() for value in node.inputs[:3] if value is not None}
            assert {each.op_type for each in sources if each is not None} == {"PackedRotary"}
            assert len(sources) == 1


def test_activations_and_residuals_move_into_the_layers(
    simplified: Callable[[str, str], ir.Model], family_name: str
) -> None:
    model = simplified(family_name, "decoder")
    FuseEpilogue(lambda name: True)(model)
    gate_up = [n for n in model.graph if n.op_type == "Linear" and "gate" in (n.name or "")]
    assert gate_up
    assert all(node.attributes["activation"].as_string() == "swiglu" for node in gate_up)
    assert operators(model)["Sigmoid"] == 0


def test_residuals_are_inputs_where_nothing_stands_between(
    simplified: Callable[[str, str], ir.Model],
) -> None:
    model = simplified("llama", "decoder")
    FuseEpilogue(lambda name: "down_proj" in name)(model)
    down = [n for n in model.graph if n.op_type == "Linear" and "down_proj" in (n.name or "")]
    assert all(len(node.inputs) == 4 and node.inputs[3] is not None for node in down)
    others = [n for n in model.graph if n.op_type == "Linear" and n not in down]
    assert all(len(node.inputs) < 4 for node in others)


def test_names_of_merged_layers_keep_the_parent() -> None:
    assert merged_name(["a.b.q", "a.b.k"]) == "a.b.q+k"
    assert merged_name(["a.q", "b.k"]) == "a.q+b.k"
