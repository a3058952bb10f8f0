"""Traces of ONNX Runtime's profiler: what every node of a run read, and how long it took."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One execution of one node.

    inputs: shapes of those present. parameter_bytes: of the constant inputs as the profiler tells,
    which are not those that ONNX Runtime has packed for itself.
    """

    op: str
    seconds: float
    inputs: tuple[Shape, ...]
    output: Shape
    parameter_bytes: int

    @property
    def is_linear(self) -> bool:
        """Whether it is what the CPU target makes of a linear layer, see targets.cpu.lower."""
        return self.op in ("LinearW8A8", "FusedMatMul")

    @property
    def is_attention(self) -> bool:
        """Whether its work grows with the square of the tokens."""
        return self.op in ("PagedAttention", "VarlenAttention")

    @property
    def weight_bytes(self) -> int:
        """Of the constant inputs, weights above all."""
        if self.op == "FusedMatMul":
            return 4 * self.inputs[0][-1] * self.output[-1]
        return self.parameter_bytes

    @property
    def linear_operations(self) -> int:
        """Two per multiply-accumulate: 2 M N K, without padding; 0 unless it is a linear layer."""
        if not self.is_linear:
            return 0
        # The packed weight is padded and the output may be of half the width (swiglu); the scales
        # are one for each output channel.
        out_features = self.inputs[2][0] if self.op == "LinearW8A8" else self.output[-1]
        return 2 * math.prod(self.inputs[0]) * out_features

    @property
    def attention_operations(self) -> int:
        """Of attention without a cache to one segment, all to all; 0 for other nodes."""
        if self.op != "VarlenAttention":
            return 0
        tokens, width = self.output
        return 4 * tokens * tokens * width


def read_trace(file: Path) -> list[list[Node]]:
    """The runs of a session in their order, each the nodes it executed."""
    runs: list[list[Node]] = []
    nodes: list[Node] = []
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and "op_name" in event["args"]:
            nodes.append(_node(event))
        elif event.get("name") == "model_run":
            runs.append(nodes)
            nodes = []
    return runs


def _node(event: dict[str, Any]) -> Node:
    details = event["args"]
    return Node(
        details["op_name"],
        event["dur"] / 1e6,
        _shapes(details["input_type_shape"]),
        _shapes(details["output_type_shape"])[0],
        int(details["parameter_size"]),
    )


def _shapes(tensors: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    """Of [{element type: shape}, ...]."""
    return tuple(tuple(shape) for tensor in tensors for shape in tensor.values())
