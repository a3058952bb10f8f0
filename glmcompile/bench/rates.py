"""What the operators reach on this machine, in a few seconds: the ground that a plan stands on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from glmcompile.quantize.packing import packed_shape
from glmcompile.targets.cpu import open_session

SECONDS = 0.1  # that each figure is measured, after one run to warm up
READ_BYTES = 512 << 20  # weights of more than that are no slower to read
INLINE_BYTES = (
    160 << 20
)  # of weights that are initializers, as an engine's; to copy more takes long
_FILLING = 60
BLOCK_SIZE = 32  # tokens of a cache block
OPSETS = {"": 23, "com.microsoft": 1, "com.glmcompile": 1}
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


class Memory:
    """Bytes for made-up weights, kept from graph to graph: filling them takes the longest."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def bytes(self, size: int) -> NDArray[np.uint8]:
        """So many; an int8 of 60 each and, four together, 0.0115 in float32."""
        if size > self._bytes.size:
            self._bytes = np.empty(size, np.uint8)
            with ThreadPoolExecutor() as pool:  # most of it is the system's work, page by page
                list(pool.map(lambda part: part.fill(_FILLING), np.array_split(self._bytes, 64)))
        return self._bytes


@dataclass(frozen=True)
class Layer:
    """A transformer layer's sizes.

    width: channels between layers; inner: inside the MLP, which is gated (SwiGLU) or not; heads,
    kv_heads, head_size: of its attention, which is causal over a paged cache, or of all to all.
    """

    width: int
    inner: int
    gated: bool
    heads: int
    kv_heads: int
    head_size: int
    paged: bool = True

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Output and input features of the linear layers, siblings merged as an engine has them."""
        attended = self.heads * self.head_size
        return (
            (attended + 2 * self.kv_heads * self.head_size, self.width),
            (self.width, attended),
            ((1 + self.gated) * self.inner, self.width),
            (self.width, self.inner),
        )

    @property
    def parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)


@dataclass(frozen=True)
class Rates:
    """Of one precision, "int8" or "fp32".

    linear, attention, vision_linear, vision_attention: GOP/s, two operations per
    multiply-accumulate. token: seconds of the graph for one token behind the prompt.
    """

    linear: float
    attention: float
    vision_linear: float
    vision_attention: float
    token: float


def layers(
    precision: str,
    layer: Layer,
    rows: int,
    threads: int,
    memory: Memory,
    *,
    count: int = 1,
    past: int = 0,
    head: int = 0,
) -> float:
    """Seconds of `count` layers one after the other, each with weights of its own.

    rows: tokens or patches; past: tokens that lie in the cache. head: output features of one more
    linear layer, lm_head's, on the last row.
    """
    graph = LayerGraph(precision, layer, rows, past)
    for number in range(count):
        graph.add_layer(number)
    if head:
        graph.add_head(head)
    return _seconds(graph.opened(threads, memory))


def attention(precision: str, layer: Layer, tokens: int, threads: int) -> float:
    """GOP/s of a layer's attention: every pair of `tokens` tokens, or half where it is causal."""
    graph = LayerGraph(precision, layer, tokens, 0)
    graph.add_attention(0, *graph.projected(layer))
    pairs = tokens * (tokens + 1) / 2 if layer.paged else tokens**2
    operations = 4 * layer.heads * layer.head_size * pairs
    return operations / _seconds(graph.opened(threads, Memory())) / 1e9


def hashing() -> float:
    """GB/s of SHA-256 on one thread."""
    block = bytes(16 << 20)
    return len(block) / _seconds(lambda: hashlib.sha256(block).digest()) / 1e9


class LayerGraph:
    """Layers as an engine has them, on made-up values, growing node by node from the input "x"."""

    def __init__(self, precision: str, layer: Layer, rows: int, past: int) -> None:
        self._int8 = precision == "int8"
        self._layer = layer
        self._rows = rows
        self._past = past
        self._rng = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self._weights: Arrays = {}
        self._feeds: Arrays = {}
        self._large: dict[str, tuple[int, int, tuple[int, ...], type]] = {}
        self._taken = 0  # bytes of them
        self._last = self._input("x", (rows, layer.width))

    def add_layer(self, number: int) -> None:
        shapes = self._layer.matrices
        half = self._layer.head_size // 2
        angles = [self._input(name, (1, self._rows, half)) for name in ("cos", "sin")]
        packed = self._linear(f"qkv{number}", self._last, shapes[0], norm=True)
        names = [f"q{number}"] + ([] if self._layer.paged else [f"k{number}", f"v{number}"])
        self._node(
            "PackedRotary", [packed, *angles], names, "com.glmcompile",
            num_heads=self._layer.heads, kv_num_heads=self._layer.kv_heads,
            head_size=self._layer.head_size,
        )  # fmt: skip
        query, *rest = names
        key, value = rest or ("", "")  # packed in the query for a paged cache
        attended = self.add_attention(number, query, key, value)
        before = self._linear(f"out{number}", attended, shapes[1], residual=self._last)
        inner = self._linear(f"up{number}", before, shapes[2], norm=True, gated=self._layer.gated)
        self._last = self._linear(f"down{number}", inner, shapes[3], residual=before)

    def projected(self, layer: Layer) -> list[str]:
        """Query, key and value as inputs."""
        return [
            self._input(name, (self._rows, heads * layer.head_size))
            for name, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads))
        ]

    def add_attention(self, number: int, query: str, key: str, value: str) -> str:
        layer, total = self._layer, self._past + self._rows
        heads: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads}
        ends = self._whole("cumulative_sequence_length", [0, self._rows])
        if not layer.paged:
            heads["compute_type"] = "int8" if self._int8 else "float32"
            inputs = [query, key, value, ends]
            return self._node("VarlenAttention", inputs, [f"a{number}"], "com.glmcompile", **heads)
        blocks = -(-total // BLOCK_SIZE)
        dtype = np.int8 if self._int8 else np.float32
        names = {"query": query, "key": key, "value": value, "": ""}
        for name in ("key_cache", "value_cache"):
            names[name] = f"{name}{number}"
            self._feeds[names[name]] = np.zeros(
                (blocks, BLOCK_SIZE, layer.kv_heads, layer.head_size), dtype
            )
        names["cumulative_sequence_length"] = ends
        names["past_seqlens"] = self._whole("past_seqlens", [self._past])
        names["block_table"] = self._whole("block_table", [list(range(blocks))])
        wanted: tuple[str, ...] = PAGED_INPUTS[:8]
        if self._int8:
            wanted = PAGED_INPUTS
            scale = np.full((layer.kv_heads, 1, layer.head_size), 0.02, np.float32)
            for name in ("k_scale", "v_scale"):
                names[name] = name
                self._weights[name] = scale
            heads |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        inputs = [names[name] for name in wanted]
        return self._node("PagedAttention", inputs, [f"a{number}"], "com.microsoft", **heads)

    def add_head(self, features: int) -> None:
        """A linear layer on the last row."""
        bounds = [self._index("from", -1), self._index("to", 2**31 - 1)]
        last = self._node("Slice", [self._last, *bounds], ["last"])
        self._last = self._linear("head", last, (features, self._layer.width), norm=True)

    def opened(self, threads: int, memory: Memory) -> Callable[[], Any]:
        """A function that runs the graph once. memory: for the linear layers' weights."""
        filled = memory.bytes(self._taken)
        self._weights |= {
            name: filled[first : first + size].view(dtype).reshape(shape)
            for name, (first, size, shape, dtype) in self._large.items()
        }
        inline = sum(array.nbytes for array in self._weights.values()) < INLINE_BYTES
        given = self._feeds if inline else {**self._feeds, **self._weights}
        written = {name for node in self.nodes for name in node.output}
        inner = {name for node in self.nodes for name in node.input}
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "rates",
                [
                    helper.make_tensor_value_info(name, _TYPES[array.dtype], array.shape)
                    for name, array in given.items()
                ],
                [
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                    for name in sorted(written - inner)
                ],
                [numpy_helper.from_array(array, name) for name, array in self._weights.items()]
                if inline
                else [],
            ),
            opset_imports=[helper.make_opsetid(*each) for each in OPSETS.items()],
            ir_version=10,
        )
        session = open_session(model.SerializeToString(), threads)
        import onnxruntime as ort

        values: Mapping[str, Any] = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()
        }
        names = [each.name for each in session.get_outputs()]
        return lambda: (session.run_with_ort_values(names, values), given)

    def _linear(
        self,
        name: str,
        x: str,
        shape: tuple[int, int],
        *,
        residual: str = "",
        norm: bool = False,
        gated: bool = False,
    ) -> str:
        out_features, in_features = shape
        if self._int8:
            self._weight(f"{name}.w", packed_shape(*shape), np.int8)
            self._weights |= {
                f"{name}.scale": np.full(out_features, 1e-4, np.float32),
                f"{name}.sum": np.full(out_features, _FILLING * in_features, np.int32),
                f"{name}.in": np.full(in_features, 0.5, np.float32),
            }
            attributes: dict[str, Any] = {"in_features": in_features, "out_features": out_features}
            attributes |= {"rms_epsilon": 1e-6} if norm else {}
            attributes |= {"activation": "swiglu"} if gated else {}
            weights = [f"{name}.w", f"{name}.scale", f"{name}.sum", "", residual, f"{name}.in"]
            return self._node("LinearW8A8", [x, *weights], [name], "com.glmcompile", **attributes)
        self._weight(f"{name}.w", shape, np.float32)
        if norm:
            self._weights[f"{name}.norm"] = np.ones(in_features, np.float32)
            x = self._node("RMSNormalization", [x, f"{name}.norm"], [f"{name}.normed"])
        y = self._node("FusedMatMul", [x, f"{name}.w"], [f"{name}.y"], "com.microsoft", transB=1)
        if gated:
            gate, up = f"{name}.gate", f"{name}.up"
            self._node("Split", [y], [gate, up], axis=-1, num_outputs=2)
            gate = self._node("QuickGelu", [gate], [f"{name}.silu"], "com.microsoft", alpha=1.0)
            y = self._node("Mul", [gate, up], [f"{name}.gated"])
        return self._node("Add", [y, residual], [f"{name}.sum"]) if residual else y

    def _weight(self, name: str, shape: tuple[int, ...], dtype: type) -> None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self._large[name] = (self._taken, size, shape, dtype)
        self._taken += -(-size // 64) * 64

    def _node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        while not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def _input(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self._feeds:
            self._feeds[name] = self._rng.standard_normal(shape, np.float32)
        return name

    def _whole(self, name: str, values: list[Any]) -> str:
        self._feeds[name] = np.array(values, np.int32)
        return name

    def _index(self, name: str, value: int) -> str:
        self._weights[name] = np.array([value], np.int32)
        return name


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
