"""PackAttention leaves alone what PackedRotary cannot hold: values of another width than keys."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from glmcompile.passes.pack_attention import PackAttention

HEADS, KV_HEADS, SIZE = 4, 2, 16


def graph(v_size: int) -> ir.Model:
    """x -> Split -> query and key -> RotaryEmbedding -> VarlenAttention, which value enters."""
    widths = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * v_size}
    shapes = {
        "x": [None, sum(widths.values())],
        "cos": [None, SIZE // 2],
        "sin": [None, SIZE // 2],
        **{name: [None, width] for name, width in widths.items()},
    }
    info = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    nodes = [helper.make_node("Split", ["x"], list(widths), axis=-1, num_outputs=3)]
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        nodes.append(
            helper.make_node(
                "RotaryEmbedding", [name, "cos", "sin"], [f"{name}_rotated"], num_heads=heads
            )
        )
    inputs = ["q_rotated", "k_rotated", "v", "cu_seqlens"]
    heads = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    nodes.append(
        helper.make_node("VarlenAttention", inputs, ["y"], domain="com.glmcompile", **heads)
    )
    cu = helper.make_tensor_value_info("cu_seqlens", TensorProto.INT32, [None])
    model = helper.make_model(
        helper.make_graph(
            nodes, "attention", [info["x"], info["cos"], info["sin"], cu],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            value_info=[info[name] for name in widths],
        ),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.glmcompile", 1)],
        ir_version=10,
    )  # fmt: skip
    return ir.serde.deserialize_model(model)


@pytest.mark.parametrize(("v_size", "packed"), [(SIZE, True), (8, False), (24, False)])
def test_values_are_packed_where_they_are_as_wide_as_keys(v_size: int, packed: bool) -> None:
    model = graph(v_size)
    assert PackAttention()(model).modified == packed
    assert ("PackedRotary" in {node.op_type for node in model.graph}) == packed
