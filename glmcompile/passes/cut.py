"""Cuts a component's graph into the layers that are compiled one after the other.

A cut is the set of named values that cross it, not one hidden state, so that rotary tables, masks
or features for a later layer pass as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

BEGIN, END = "begin", "end"


@dataclass(frozen=True)
class Segment:
    """A part of a component's graph that runs alone.

    name: the layer's module path, or BEGIN or END for what lies before and after the layers.
    inputs, outputs: names of the values that cross its ends, inputs and outputs of the component
        among them.
    """

    name: str
    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(model: ir.Model, layers: Sequence[str]) -> list[Segment]:
    """The graph as segments in the order in which they run; their nodes are copies.

    layers: module paths of the layers in their order, to which parameters belong by their names.
    A node belongs to the latest layer that it needs a parameter or a value of. Segments without a
    node are left out.
    """
    stages = stages_of(model.graph, layers)
    names = (BEGIN, *layers, END)
    crossing = _crossing(model.graph, stages)
    segments = []
    for stage, name in enumerate(names):
        inputs, outputs = crossing.get(stage, ([], []))
        if not outputs:
            continue
        for value in inputs:
            _give_type(value)
        graph = ir.convenience.extract(model.graph, inputs, outputs)
        graph.name = f"{model.graph.name}.{name}"
        segments.append(
            Segment(
                name,
                ir.Model(graph, ir_version=model.ir_version),
                tuple(str(value.name) for value in inputs),
                tuple(str(value.name) for value in outputs),
            )
        )
    return segments


def stages_of(graph: ir.Graph, layers: Sequence[str], sink: bool = True) -> dict[ir.Node, int]:
    """The number of each node's segment: 0 before the layers, len(layers) + 1 after them.

    sink: let nodes that serve a later segment alone go there where fewer values cross then.
    """
    stage_of = {path: number for number, path in enumerate(layers, 1)}
    pattern = re.compile("|".join(f"(?:{re.escape(path)})(?=[.])" for path in layers) or "(?!)")
    is_parameter = _parameters_of(graph)
    stages: dict[ir.Node, int] = {}
    for node in graph:
        before = 0
        own: int | None = None
        for value in node.inputs:
            if value is None:
                continue
            if value.is_initializer():
                match = pattern.match(str(value.name))
                if match is not None:
                    own = max(own or 0, stage_of[match[0]])
                elif is_parameter(value):
                    own = own or 0
            elif (producer := value.producer()) is not None:
                before = max(before, stages[producer])
        after_layers = own == 0 and before > 0
        stages[node] = len(layers) + 1 if after_layers else max(before, own or 0)
    if sink:
        _sink(graph, stages, is_parameter)
    return stages


def _parameters_of(graph: ir.Graph) -> Callable[[ir.Value | None], bool]:
    """Whether a value comes from the checkpoint: by its name, a path.

    The tracer's constants have no dots in theirs; a cache's scales are named after the cache.
    """
    scales = tuple(f"{value.name}." for value in graph.inputs)
    return lambda value: (
        value is not None
        and value.is_initializer()
        and "." in str(value.name)
        and not str(value.name).startswith(scales)
    )


def _sink(
    graph: ir.Graph,
    stages: dict[ir.Node, int],
    is_parameter: Callable[[ir.Value | None], bool],
) -> None:
    """Moves nodes that serve later segments alone into the first of them, where fewer values cross
    or none more.

    A residual stream is then the only large value between two layers: a normalization without
    weights that the next layer or the output begins with goes with them.
    """
    movable: dict[int, list[ir.Node]] = {}
    watching = _watching(graph)
    for node in reversed(graph):
        stage = stages[node]
        if stage == 0 or node in watching or any(is_parameter(value) for value in node.inputs):
            continue
        if any(output.is_graph_output() for output in node.outputs):
            continue
        own = movable.setdefault(stage, [])
        users = [use.node for output in node.outputs for use in output.uses()]
        users = [user for user in users if user not in watching]
        if users and all(stages[user] > stage or user in own for user in users):
            own.append(node)
    given = _given(graph, is_parameter)
    for stage, nodes in movable.items():
        _move(stage, nodes[::-1], stages, given)
    for node in graph:  # who watches a value goes with those who use it
        if node in watching:
            value = node.inputs[0]
            users = [] if value is None else [use.node for use in value.uses()]
            others = [stages[user] for user in users if user not in watching]
            stages[node] = min(others, default=max(_stage(each, stages) for each in node.inputs))


def _watching(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that serve nothing but an output beside the component's own, which is the first."""
    found: set[ir.Node] = set()
    own = graph.outputs[0]
    for node in reversed(graph):
        users = [use.node for output in node.outputs for use in output.uses()]
        ends = [output for output in node.outputs if output.is_graph_output()]
        if own not in ends and (ends or users) and all(user in found for user in users):
            found.add(node)
    return found


def _given(graph: ir.Graph, is_parameter: Callable[[ir.Value | None], bool]) -> frozenset[ir.Value]:
    """Values that are computed from the component's inputs without any parameter."""
    found = set(graph.inputs)
    for node in graph:
        if all(
            value is None or value in found or (value.is_initializer() and not is_parameter(value))
            for value in node.inputs
        ):
            found.update(node.outputs)
    return frozenset(found)


def _move(
    stage: int, nodes: list[ir.Node], stages: dict[ir.Node, int], given: frozenset[ir.Value]
) -> None:
    """Moves those of `nodes` behind the first place where the fewest values cross.

    nodes: of one stage, in their order; they serve later stages alone. given: see `_given`; these
    cost nothing.
    """
    best, fewest = 0, None
    for start in range(len(nodes) + 1):
        crossing = len(_taken(stage, nodes[start:], stages) - given)
        if fewest is None or crossing < fewest:
            best, fewest = start, crossing
    for node in reversed(nodes[best:]):
        users = [use.node for output in node.outputs for use in output.uses()]
        stages[node] = min(stages[user] for user in users if stages[user] > stage)


def _taken(stage: int, moved: list[ir.Node], stages: Mapping[ir.Node, int]) -> set[ir.Value]:
    """Values that cross the end of a stage once these nodes lie behind it, small ones (row numbers,
    lengths: integers) left aside."""
    gone = set(moved)
    return {
        output
        for node, own in stages.items()
        if own <= stage and node not in gone
        for output in node.outputs
        if output.dtype is None or output.dtype.is_floating_point()
        if any(stages[use.node] > stage or use.node in gone for use in output.uses())
    }


def _stage(value: ir.Value | None, stages: Mapping[ir.Node, int]) -> int:
    producer = value.producer() if value is not None else None
    return stages[producer] if producer is not None else 0


def _give_type(value: ir.Value) -> None:
    """Rewrites leave values without a type; those that cross have that of what they come from."""
    if value.type is None and (producer := value.producer()) is not None:
        source = next(each for each in producer.inputs if each is not None)
        _give_type(source)
        value.type = source.type


def _crossing(
    graph: ir.Graph, stages: Mapping[ir.Node, int]
) -> dict[int, tuple[list[ir.Value], list[ir.Value]]]:
    """Of each segment the values that it takes from outside and those that it gives."""
    found: dict[int, tuple[dict[ir.Value, None], dict[ir.Value, None]]] = {}
    for node in graph:
        stage = stages[node]
        inputs, _ = found.setdefault(stage, ({}, {}))
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None:
                inputs[value] = None
            elif stages[producer] != stage:
                inputs[value] = None
                found[stages[producer]][1][value] = None
    for value in graph.outputs:
        producer = value.producer()
        assert producer is not None, f"{value.name} is computed by no node"
        found[stages[producer]][1][value] = None
    return {stage: (list(inputs), list(outputs)) for stage, (inputs, outputs) in found.items()}


def last_uses(segments: Iterable[Segment]) -> dict[str, int]:
    """Number of the last segment that takes each value."""
    return {name: index for index, segment in enumerate(segments) for name in segment.inputs}
