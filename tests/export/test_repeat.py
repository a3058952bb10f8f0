"""One layer of a kind is traced and repeated: the graph is the one that tracing all gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from glmcompile.checkpoint import open_checkpoint
from glmcompile.export import export_component
from glmcompile.export import exporter as exporter_module
from glmcompile.export.repeat import repeat_layer, shorten
from tests.checkpoints import write_checkpoint


def described(model: ir.Model) -> set[tuple]:
    """Every node by its operator, its parameters and caches, and the operators that it reads."""
    return {
        (
            node.op_type,
            node.name if node.op_type == "Linear" else "",
            tuple(
                str(value.name) if value.is_initializer() and "." in str(value.name) else None
                for value in node.inputs
                if value is not None
            ),
            tuple(
                str(value.name)
                for value in node.inputs
                if value is not None and value.is_graph_input()
            ),
            tuple(
                producer.op_type if (producer := value.producer()) is not None else ""
                for value in node.inputs
                if value is not None
            ),
        )
        for node in model.graph
    }


def test_repeating_gives_the_graph_that_tracing_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_name: str
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(family_name, tmp_path, layers=4))
    components = list(checkpoint.model.components)
    monkeypatch.setattr(exporter_module, "repeat_layer", counted := Counted())
    repeated = {name: export_component(checkpoint, name) for name in components}
    assert counted.calls == len(components)
    monkeypatch.setattr(exporter_module, "shorten", lambda model, root: [])
    for name, model in repeated.items():
        traced = export_component(checkpoint, name)
        assert len(list(model.graph)) == len(list(traced.graph))
        assert described(model) == described(traced)
        assert parameters(model) == parameters(traced)
        assert [each.name for each in model.graph.inputs] == [
            each.name for each in traced.graph.inputs
        ]


def parameters(model: ir.Model) -> set[str]:
    return {name for name in model.graph.initializers if "." in name}


class Counted:
    """repeat_layer, counting the graphs that it did not refuse."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> None:
        repeat_layer(*arguments)
        self.calls += 1


class Layer(nn.Module):
    def __init__(self, width: int = 4, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.inner = nn.Linear(4, width)


class Model(nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def paths(self) -> list[str]:
        return [f"layers.{index}" for index in range(len(self.layers))]


def test_layers_that_are_alike_are_cut_to_two() -> None:
    model = Model(Layer(), Layer(), Layer(), Layer())
    every = model.paths
    assert shorten(model, every) == every
    assert model.paths == every[:2]


@pytest.mark.parametrize(
    "odd", [Layer(width=5), Layer(window=512)], ids=["another width", "another setting"]
)
def test_layers_that_differ_are_all_traced(odd: Layer) -> None:
    model = Model(Layer(), Layer(), odd)
    assert shorten(model, model.paths) == []
    assert len(model.layers) == 3


def test_layers_whose_buffers_differ_are_all_traced() -> None:
    layers = [Layer(), Layer(), Layer()]
    for number, layer in enumerate(layers):
        layer.register_buffer("table", torch.tensor([float(number)]))
    model = Model(*layers)
    assert shorten(model, model.paths) == []


def test_layers_of_which_some_do_not_run_are_all_traced() -> None:
    model = Model(Layer(), Layer(), Layer(), Layer())
    assert shorten(model, model.paths[:-1]) == []
    assert len(model.layers) == 4


def test_layers_of_two_lists_are_all_traced() -> None:
    model = nn.Module()
    model.first, model.second = Model(Layer(), Layer()), Model(Layer(), Layer())
    paths = [f"{name}.{path}" for name in ("first", "second") for path in model.first.paths]
    assert shorten(model, paths) == []
