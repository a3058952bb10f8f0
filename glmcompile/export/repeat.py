"""Traces one layer of each kind and repeats it: tracing costs a second a layer, copying nothing.

Every layer of what comes out is compared with its own torch module when it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from torch import nn

from glmcompile.errors import ExportError
from glmcompile.passes.cut import stages_of

TRACED = 2  # layers of a list that are traced: the first, and the one that is repeated
_PLAIN = (bool, int, float, str, tuple, type(None))
_OWN = {"layer_idx", "training"}  # what may differ between layers that are alike


def shorten(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Leave TRACED of these layers, if they are one whole list and all alike.

    Returns the paths of all layers that it had, or nothing where it stays as it is.
    """
    lists = {path.rpartition(".")[0] for path in layers}
    if len(lists) != 1:
        return []
    modules = model.get_submodule(lists.pop())
    assert isinstance(modules, nn.ModuleList)
    if len(modules) != len(layers) or len(modules) <= TRACED:
        return []
    if not all(_alike(modules[0], each) for each in modules):
        return []
    del modules[TRACED:]
    return list(layers)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return _kind(one) == _kind(other) and all(
        torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True)
    )


def _kind(layer: nn.Module) -> list[Any]:
    """Classes, settings and shapes of a layer's modules."""
    return [
        (
            name,
            type(module),
            {key: value for key, value in _settings(module).items()},
            {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)},
            [key for key, _ in module.named_buffers(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, _PLAIN) and key not in _OWN and not key.startswith("_")
    }


def repeat_layer(model: ir.Model, layers: Sequence[str]) -> None:
    """Copy the last traced layer for every path in `layers` behind it, in place.

    Parameters take the names they have in their own layer, caches the number of theirs.
    Raises ExportError where the two traced layers are not the same operators in the same order.
    """
    graph = model.graph
    stages = stages_of(graph, layers, sink=False)
    first, traced = ([node for node in graph if stages[node] == stage] for stage in (1, TRACED))
    if [node.op_type for node in first] != [node.op_type for node in traced]:
        raise ExportError(f"{graph.name}: the layers {layers[0]} and {layers[1]} are not alike")
    # What a layer takes from the one before, and what it gives in the same place itself.
    given = {
        taken: own
        for before, after in zip(first, traced, strict=True)
        for taken, own in zip(before.outputs, after.outputs, strict=True)
    }
    behind = [
        (use, output)
        for node in traced
        for output in node.outputs
        for use in output.uses()
        if stages[use.node] != TRACED
    ]
    latest = {own: own for own in given.values()}
    for number in range(TRACED, len(layers)):
        copies = {taken: latest[own] for taken, own in given.items()}
        for node in traced:
            graph.append(_copied(graph, node, copies, layers, number))
        latest = {own: copies[own] for own in given.values()}
    for use, output in behind:
        use.node.replace_input_with(use.idx, latest[output])
    common_passes.TopologicalSortPass()(model)


def _copied(
    graph: ir.Graph,
    node: ir.Node,
    copies: dict[ir.Value, ir.Value],
    layers: Sequence[str],
    number: int,
) -> ir.Node:
    """A node of the traced layer for layer `number`; its outputs are added to `copies`."""
    inputs = []
    for value in node.inputs:
        if value is not None and value not in copies:
            copies[value] = _own(graph, value, layers, number)
        inputs.append(None if value is None else copies[value])
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=_renamed(node.name or "", layers, number) or None,
        version=node.version,
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = f"{old.name}.{number}"
        new.type, new.shape = old.type, old.shape
        copies[old] = new
    return copy


def _own(graph: ir.Graph, value: ir.Value, layers: Sequence[str], number: int) -> ir.Value:
    """What layer `number` reads in place of a parameter or cache of the traced one."""
    name = str(value.name)
    if value.is_initializer():
        renamed = _renamed(name, layers, number)
        if renamed == name:
            return value
        own = ir.Value(
            name=renamed, shape=value.shape, type=value.type, const_value=value.const_value
        )
        graph.initializers[renamed] = own
        return own
    if value.is_graph_input() and name.endswith(f"_cache.{TRACED - 1}"):
        wanted = f"{name.rpartition('.')[0]}.{number}"
        return next(each for each in graph.inputs if each.name == wanted)
    return value


def _renamed(name: str, layers: Sequence[str], number: int) -> str:
    traced = f"{layers[TRACED - 1]}."
    return f"{layers[number]}.{name.removeprefix(traced)}" if name.startswith(traced) else name
