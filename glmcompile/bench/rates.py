"""What the operators reach on this machine, in a few seconds: the ground that a plan stands on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from glmcompile.quantize.packing import packed_shape
from glmcompile.targets.cpu import open_session

SECONDS = 0.15  # that each figure is measured, after one run to warm up
ROWS = 512  # tokens multiplied at once
READ_BYTES = 512 << 20  # weights of more than that are no slower to read
MATRIX_BYTES = 32 << 20
BLOCK_SIZE = 32  # tokens of a cache block
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
}
# Inputs of com.microsoft::PagedAttention in their order; those without a name are left out.
PAGED_INPUTS = (
    "query", "key", "value", "key_cache", "value_cache", "cumulative_sequence_length",
    "past_seqlens", "block_table", "", "", "", "", "", "", "k_scale", "v_scale",
)  # fmt: skip

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Heads:
    """Of an attention: query heads, heads of keys and values, channels of each."""

    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Rates:
    """Of one precision, "int8" or "fp32".

    linear, attention, vision_attention: GOP/s, two operations per multiply-accumulate.
    read: GB/s at which one token's linear layers read their weights.
    """

    linear: float
    read: float
    attention: float
    vision_attention: float


def linear(precision: str, in_features: int, threads: int) -> float:
    """GOP/s of a linear layer on ROWS rows, of a weight of about MATRIX_BYTES."""
    out_features = _rounded(MATRIX_BYTES / in_features)
    run = _linear(precision, in_features, [out_features], ROWS, threads)
    return 2 * ROWS * in_features * out_features / _seconds(run) / 1e9


def read(precision: str, in_features: int, weights: int, threads: int) -> float:
    """GB/s at which layers of `weights` bytes together, or READ_BYTES, multiply one row."""
    size = 1 if precision == "int8" else 4
    total = min(weights, READ_BYTES)
    count = max(1, round(total / MATRIX_BYTES))
    out_features = _rounded(total / count / size / in_features)
    run = _linear(precision, in_features, [out_features] * count, 1, threads)
    return count * out_features * in_features * size / _seconds(run) / 1e9


def attention(precision: str, heads: Heads, tokens: int, threads: int) -> float:
    """GOP/s of causal attention over the paged cache that `tokens` new tokens fill."""
    blocks = -(-tokens // BLOCK_SIZE)
    channels = heads.head_size
    dtype = np.int8 if precision == "int8" else np.float32
    pool = np.zeros((blocks, BLOCK_SIZE, heads.kv_heads, channels), dtype)
    feeds = {
        **_packed(heads, tokens),
        "key_cache": pool,
        "value_cache": pool.copy(),
        "cumulative_sequence_length": np.array([0, tokens], np.int32),
        "past_seqlens": np.zeros(1, np.int32),
        "block_table": np.arange(blocks, dtype=np.int32)[None],
    }
    attributes: dict[str, Any] = {"num_heads": heads.heads, "kv_num_heads": heads.kv_heads}
    names = PAGED_INPUTS[: len(feeds)]
    if precision == "int8":
        scale = np.full((heads.kv_heads, 1, channels), 0.02, np.float32)
        feeds |= {"k_scale": scale, "v_scale": scale}
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        names = PAGED_INPUTS
    node = helper.make_node("PagedAttention", names, ["y"], domain="com.microsoft", **attributes)
    operations = 4 * heads.heads * channels * tokens * (tokens + 1) / 2
    return operations / _seconds(_model([node], feeds, {}, threads)) / 1e9


def vision_attention(precision: str, heads: Heads, patches: int, threads: int) -> float:
    """GOP/s of attention between all patches of an image."""
    feeds = {**_packed(heads, patches), "cu_seqlens": np.array([0, patches], np.int32)}
    node = helper.make_node(
        "VarlenAttention",
        list(feeds),
        ["y"],
        domain="com.glmcompile",
        num_heads=heads.heads,
        kv_num_heads=heads.kv_heads,
        compute_type="int8" if precision == "int8" else "float32",
    )
    operations = 4 * heads.heads * heads.head_size * patches**2
    return operations / _seconds(_model([node], feeds, {}, threads)) / 1e9


def hashing() -> float:
    """GB/s of SHA-256 on one thread."""
    block = bytes(16 << 20)
    return len(block) / _seconds(lambda: hashlib.sha256(block).digest()) / 1e9


def operator_seconds(threads: int) -> float:
    """What one small operator takes in a graph of many."""
    count = 200
    nodes = [
        helper.make_node(
            "Add", [f"y{n}" if n else "x", "x"], [f"y{n + 1}" if n + 1 < count else "y"]
        )
        for n in range(count)
    ]
    feeds = {"x": np.zeros((1, 64), np.float32)}
    return _seconds(_model(nodes, feeds, {}, threads)) / count


def _rounded(features: float) -> int:
    return max(16, round(features / 16) * 16)


def _packed(heads: Heads, tokens: int) -> Arrays:
    rng = np.random.default_rng(0)

    def rows(count: int) -> NDArray[np.float32]:
        return rng.standard_normal((tokens, count * heads.head_size), np.float32)

    return {"query": rows(heads.heads), "key": rows(heads.kv_heads), "value": rows(heads.kv_heads)}


def _linear(
    precision: str, in_features: int, outputs: list[int], rows: int, threads: int
) -> Callable[[], Any]:
    """Layers with weights of their own, all on the same rows."""
    feeds: Arrays = {"x": np.random.default_rng(0).standard_normal((rows, in_features), np.float32)}
    weights: Arrays = {}
    nodes = []
    for number, out_features in enumerate(outputs):
        names = ["x", f"w{number}"]
        if precision == "int8":
            shape = packed_shape(out_features, in_features)
            weights[f"w{number}"] = np.full(shape, 3, np.int8)
            weights[f"s{number}"] = np.full(out_features, 0.01, np.float32)
            weights[f"t{number}"] = np.full(out_features, 3 * in_features, np.int32)
            nodes.append(
                helper.make_node(
                    "LinearW8A8",
                    [*names, f"s{number}", f"t{number}"],
                    [f"y{number}"],
                    domain="com.glmcompile",
                    in_features=in_features,
                    out_features=out_features,
                )
            )
        else:
            weights[f"w{number}"] = np.full((out_features, in_features), 0.01, np.float32)
            nodes.append(
                helper.make_node(
                    "FusedMatMul", names, [f"y{number}"], domain="com.microsoft", transB=1
                )
            )
    return _model(nodes, feeds, weights, threads)


def _model(nodes: list[Any], feeds: Arrays, weights: Arrays, threads: int) -> Callable[[], Any]:
    """A function that runs the nodes once. Weights are inputs, so that none is copied."""
    given = {**feeds, **weights}
    outputs = {name for node in nodes for name in node.output}
    inner = {name for node in nodes for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "rates",
            [
                helper.make_tensor_value_info(name, _TYPES[array.dtype], array.shape)
                for name, array in given.items()
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                for name in sorted(outputs - inner)
            ],
        ),
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid("com.glmcompile", 1),
        ],
        ir_version=10,
    )
    session = open_session(model.SerializeToString(), threads)
    import onnxruntime as ort

    values: Mapping[str, Any] = {
        name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()
    }
    names = [each.name for each in session.get_outputs()]
    return lambda: (session.run_with_ort_values(names, values), given)


def _seconds(run: Callable[[], Any]) -> float:
    """The fastest of the runs that fit into SECONDS, after one to warm up."""
    run()
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        fastest = min(fastest, now - began)
        if now > end:
            return fastest
