"""The layers that a plan measures are those that engines have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest

from glmcompile.bench import rates
from glmcompile.bench.rates import Layer, LayerGraph, Memory
from glmcompile.checkpoint import open_checkpoint
from glmcompile.compiler.geometry import geometry
from tests.engines import TinyEngine

LAYER = Layer(width=64, inner=96, gated=True, heads=4, kv_heads=2, head_size=16)
OPERATORS = {"LinearW8A8", "PackedRotary", "PagedAttention", "VarlenAttention"}


@pytest.mark.parametrize("component", ["decoder", "vision_encoder"])
def test_a_measured_layer_has_the_operators_of_an_engines(
    tiny_engine: Callable[..., TinyEngine], component: str
) -> None:
    tiny = tiny_engine("glm4v", "int8")
    graph = onnx.load(tiny.path / f"{component}.onnx", load_external_data=False).graph
    checkpoint = open_checkpoint(tiny.checkpoint)
    shapes, model = geometry(checkpoint), checkpoint.model
    decoder = component == "decoder"
    layer = shapes.layer(model) if decoder else shapes.vision_layer(model)
    assert layer is not None
    measured = LayerGraph("int8", layer, rows=4, past=0)
    measured.add_layer(0)

    def described(node: onnx.NodeProto) -> tuple:
        names = {"in_features", "out_features", "num_heads", "kv_num_heads", "head_size"}
        values = {each.name: each.i for each in node.attribute if each.name in names}
        return node.op_type, tuple(sorted(values.items()))

    expected = Counter(described(node) for node in graph.node if node.op_type in OPERATORS)
    one = Counter(described(node) for node in measured.nodes)
    layers = shapes.layers if decoder else shapes.vision_layers
    for key, count in one.items():
        assert expected[key] >= layers * count, key


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_layers_run_one_after_the_other(precision: str, paged: bool, gated: bool) -> None:
    layer = replace(LAYER, paged=paged, gated=gated, kv_heads=2 if paged else 4)
    assert rates.layers(precision, layer, 5, 1, Memory(), count=3, past=40 if paged else 0) > 0
    assert rates.attention(precision, layer, 33, 1) > 0


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_head_sees_the_last_row(precision: str) -> None:
    graph = LayerGraph(precision, LAYER, rows=7, past=3)
    graph.add_layer(0)
    graph.add_head(48)
    outputs, _ = graph.opened(1, Memory())()
    assert [value.shape() for value in outputs] == [[1, 48]]


def test_weights_too_large_to_copy_are_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "INLINE_BYTES", 0)
    assert rates.layers("int8", LAYER, 1, 1, Memory(), count=2, head=32) > 0
