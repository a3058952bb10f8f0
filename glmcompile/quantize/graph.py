"""Turns a simplified graph into its INT8 form: linear layers, embedding, lm_head, KV cache.

The form does not depend on what calibration finds: every tensor that does is read when it is
written, so that a graph can be converted whole and its layers calibrated one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from glmcompile.calibrate.observe import experts_observation
from glmcompile.errors import CalibrationError
from glmcompile.passes.fuse_epilogue import FuseEpilogue
from glmcompile.passes.fuse_norm import FuseNorm
from glmcompile.passes.matching import (
    DOMAIN,
    describe,
    dimensions,
    integer,
    lazy_initializer,
    replace,
    width,
)
from glmcompile.quantize.experts import (
    Channels,
    QuantizedExperts,
    arrange_bias,
    quantize_experts,
)
from glmcompile.quantize.packing import interleave_gate_up, packed_shape
from glmcompile.quantize.schemes import W8A8, Recipe
from glmcompile.quantize.weights import QuantizedWeight, quantize_weight

# Input numbers of com.microsoft::PagedAttention.
KEY_CACHE, VALUE_CACHE, K_SCALE, V_SCALE = 3, 4, 14, 15

Statistics = Mapping[str, NDArray[np.float32]]
T = TypeVar("T")


def quantize_graph(
    model: ir.Model, recipe: Recipe, statistics: Statistics, shared: Collection[str] = ()
) -> dict[str, str]:
    """Quantize a component in place, as the recipe says.

    statistics: largest magnitude per channel, by observation name (see calibrate.observe); read
        when tensors are, so it may be filled later. A tensor of a layer that no sample reached
        raises CalibrationError then.
    shared: names of weights that both the embedding and lm_head read: their channels cannot be
        scaled for one of the two.
    Returns the scheme each linear layer got, by layer name.
    """
    quantized: dict[str, str] = {}
    latest = _Latest()
    FuseEpilogue(lambda name: isinstance(_scheme(recipe, name), W8A8))(model)
    for node in list(model.graph):
        if node.op_type == "Linear" and node.domain == DOMAIN:
            scheme = _scheme(recipe, node.name or "")
            quantized[node.name or ""] = "w8a8" if isinstance(scheme, W8A8) else "float32"
            if isinstance(scheme, W8A8):
                _convert_linear(model, node, scheme, statistics, shared, latest)
        elif node.op_type == "MoE" and node.domain == DOMAIN:
            name = str(node.inputs[3].name).rpartition(".")[0]  # type: ignore[union-attr]
            scheme = _scheme(recipe, name)
            quantized[name] = "w8a8" if isinstance(scheme, W8A8) else "float32"
            if isinstance(scheme, W8A8):
                _convert_experts(model, node, scheme, statistics, latest)
    model.opset_imports[DOMAIN] = 1
    common_passes.RemoveUnusedNodesPass()(model)
    FuseNorm()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.TopologicalSortPass()(model)
    if isinstance(recipe.linear, W8A8):
        _convert_embedding(model, latest)
        _convert_attention(model)
    if recipe.kv_dtype == "int8":
        _convert_cache(model, statistics)
    return quantized


def _observed(statistics: Statistics, name: str) -> NDArray[np.float32]:
    if name not in statistics:
        raise CalibrationError(
            f"no calibration sample reached {name}; a model with images needs samples with images."
        )
    return statistics[name]


def _scheme(recipe: Recipe, layer: str) -> object:
    # A merged layer, `attn.q_proj+k_proj+v_proj`, is asked for by its first part.
    return recipe.scheme_for(layer.split("+")[0])


def _convert_linear(
    model: ir.Model,
    node: ir.Node,
    scheme: W8A8,
    statistics: Statistics,
    shared: Collection[str],
    latest: _Latest,
) -> None:
    x, weight, bias, residual = [*node.inputs, None, None][:4]
    assert x is not None and weight is not None
    out_features, in_features = dimensions(weight)
    attribute = node.attributes.get("activation")
    activation = attribute.as_string() if attribute is not None else ""
    swiglu = activation == "swiglu"
    # A weight that the embedding reads, too, has to keep its channels' scales.
    smoothing = 0.0 if weight.name in shared else scheme.smoothing
    observation = f"{node.name}.input"

    def quantize() -> QuantizedWeight:
        absmax = _observed(statistics, observation) if smoothing else None
        return quantize_weight(_array(weight), absmax, smoothing, swiglu)

    read = latest.reader(quantize)
    initializers = _weight_initializers(model.graph, weight, read)
    tape = ir.tape.Tape(model.graph)
    factors = None
    if smoothing:
        name = f"{weight.name}.input_scale"
        factors = _initializer(model.graph, name, np.float32, [in_features], read, "input_scale")
    if bias is not None and swiglu:
        bias = _interleaved_bias(model.graph, bias)
    output = tape.op(
        "LinearW8A8",
        [x, *initializers, bias, residual, factors],
        domain=DOMAIN,
        name=node.name,
        attributes={
            "in_features": in_features,
            "out_features": out_features,
            "activation": activation,
        },
    )
    old = node.outputs[0]
    describe(output, like=old)
    replace(old, output)


def _convert_experts(
    model: ir.Model, node: ir.Node, scheme: W8A8, statistics: Statistics, latest: _Latest
) -> None:
    """A mixture's experts. SmoothQuant is for their first layer, whose input calibration sees; an
    expert that no sample reached goes without."""
    x, chosen, weights, up, down, up_bias, down_bias = [*node.inputs, None, None][:7]
    assert up is not None and down is not None
    attributes = {
        name: attribute
        for name, attribute in node.attributes.items()
        if name not in ("interleaved", "transposed")
    }
    transposed = bool(integer(node, "transposed", 0))
    channels = Channels.PLAIN
    if integer(node, "gated", 1):
        interleaved = integer(node, "interleaved", 0)
        channels = Channels.INTERLEAVED if interleaved else Channels.CONCATENATED
    observation = experts_observation(up)
    smoothing = scheme.smoothing
    factors: dict[str, NDArray] = {}  # small, and wanted after the second layer's weights

    def quantize_up() -> QuantizedExperts:
        absmax = _observed(statistics, observation) if smoothing else None
        made = quantize_experts(_array(up), channels, transposed, absmax, smoothing)
        if made.input_scale is not None:
            factors["input_scale"] = made.input_scale
        return made

    def input_scale() -> NDArray:
        if not factors:
            quantize_up()
        return factors["input_scale"]

    def quantize_down() -> QuantizedExperts:
        return quantize_experts(_array(down), Channels.PLAIN, transposed)

    inputs = [
        *_experts_initializers(model.graph, up, transposed, latest.reader(quantize_up)),
        *_experts_initializers(model.graph, down, transposed, latest.reader(quantize_down)),
    ]
    scales = None
    if smoothing:
        shape = [dimensions(up)[0], dimensions(up)[1 if transposed else 2]]
        name = f"{up.name}.input_scale"
        scales = lazy_initializer(model.graph, name, ir.DataType.FLOAT, shape, input_scale)
    if up_bias is not None:
        up_bias = _arranged_bias(model.graph, up_bias, channels)
    tape = ir.tape.Tape(model.graph)
    output = tape.op(
        "MoEW8A8",
        [x, chosen, weights, *inputs, up_bias, down_bias, scales],
        domain=DOMAIN,
        name=node.name,
    )
    producer = output.producer()
    assert producer is not None
    producer.attributes.update(attributes)
    old = node.outputs[0]
    describe(output, like=old)
    replace(old, output)


def _experts_initializers(
    graph: ir.Graph, weight: ir.Value, transposed: bool, read: Callable[[], QuantizedExperts]
) -> list[ir.Value]:
    experts, out_features, in_features = dimensions(weight)
    if transposed:
        out_features, in_features = in_features, out_features
    packed = [experts, *packed_shape(out_features, in_features)]
    channels = [experts, out_features]
    return [
        _initializer(graph, f"{weight.name}.int8", np.int8, packed, read, "packed"),
        _initializer(graph, f"{weight.name}.scale", np.float32, channels, read, "scale"),
        _initializer(graph, f"{weight.name}.sum", np.int32, channels, read, "sum"),
    ]


def _array(weight: ir.Value) -> NDArray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _arranged_bias(graph: ir.Graph, bias: ir.Value, channels: Channels) -> ir.Value:
    tensor = bias.const_value
    assert tensor is not None
    return lazy_initializer(
        graph,
        f"{bias.name}.interleaved",
        tensor.dtype,
        dimensions(bias),
        lambda: arrange_bias(tensor.numpy(), channels),
    )


class _Latest:
    """Quantizes weights when they are read and keeps the last result.

    A layer's tensors are written one after the other, so one is enough.
    """

    def __init__(self) -> None:
        self._reader: object = None
        self._result: Any = None

    def reader(self, quantize: Callable[[], T]) -> Callable[[], T]:
        """A function that gives what `quantize` does."""

        def read() -> T:
            if self._reader is not read:
                self._reader = self._result = None  # the one before is let go first
                self._result = quantize()
                self._reader = read
            return self._result

        return read


def _weight_initializers(
    graph: ir.Graph, weight: ir.Value, read: Callable[[], QuantizedWeight]
) -> list[ir.Value]:
    out_features, in_features = dimensions(weight)
    shape = list(packed_shape(out_features, in_features))
    return [
        _initializer(graph, f"{weight.name}.int8", np.int8, shape, read, "packed"),
        _initializer(graph, f"{weight.name}.scale", np.float32, [out_features], read, "scale"),
        _initializer(graph, f"{weight.name}.sum", np.int32, [out_features], read, "sum"),
    ]


def _initializer(
    graph: ir.Graph,
    name: str,
    dtype: type[np.generic],
    shape: list[int],
    read: Callable[[], QuantizedWeight | QuantizedExperts],
    field: str,
) -> ir.Value:
    if name in graph.initializers:  # of a weight that the embedding and lm_head share
        return graph.initializers[name]
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    return lazy_initializer(graph, name, kind, shape, lambda: getattr(read(), field))


def _interleaved_bias(graph: ir.Graph, bias: ir.Value) -> ir.Value:
    tensor = bias.const_value
    assert tensor is not None
    return lazy_initializer(
        graph,
        f"{bias.name}.interleaved",
        tensor.dtype,
        dimensions(bias),
        lambda: interleave_gate_up(*np.split(tensor.numpy(), 2)),
    )


def _embedding_gather(model: ir.Model) -> ir.Value | None:
    """The embedding table: the matrix that a Gather reads rows of."""
    for node in model.graph:
        if node.op_type == "Gather" and node.inputs[0] is not None:
            table = node.inputs[0]
            if table.is_initializer() and table.shape is not None and len(table.shape) == 2:
                return table
    return None


def _convert_embedding(model: ir.Model, latest: _Latest) -> None:
    table = _embedding_gather(model)
    if table is None:
        return
    out_features, in_features = dimensions(table)
    read = latest.reader(lambda: quantize_weight(_array(table)))
    packed, scale, _ = _weight_initializers(model.graph, table, read)
    tape = ir.tape.Tape(model.graph)
    for use in list(table.uses()):
        rows = tape.op(
            "EmbeddingW8",
            [use.node.inputs[1], packed, scale],
            domain=DOMAIN,
            attributes={"in_features": in_features, "out_features": out_features},
        )
        old = use.node.outputs[0]
        describe(rows, like=old)
        replace(old, rows)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.TopologicalSortPass()(model)


def _convert_attention(model: ir.Model) -> None:
    """Attention without a cache multiplies integers, too, with scales of the kernel's own."""
    for node in model.graph:
        if node.op_type == "VarlenAttention":
            node.attributes["compute_type"] = ir.AttrString("compute_type", "int8")


def _convert_cache(model: ir.Model, statistics: Statistics) -> None:
    """Int8 pools, one scale per head and channel from the largest magnitude in calibration."""
    for layer, node in enumerate(each for each in model.graph if each.op_type == "PagedAttention"):
        heads = node.attributes["kv_num_heads"].as_int()
        node.resize_inputs(V_SCALE + 1)
        for name, cache, position in (
            ("key", KEY_CACHE, K_SCALE),
            ("value", VALUE_CACHE, V_SCALE),
        ):
            observation = f"{name}.{layer}"
            pool = node.inputs[cache]
            head_size = width(pool) if pool is not None else None
            assert pool is not None and head_size is not None
            value = lazy_initializer(
                model.graph,
                f"{pool.name}.scale",
                ir.DataType.FLOAT,
                [heads, 1, head_size],
                partial(_cache_scale, statistics, observation, heads),
            )
            node.replace_input_with(position, value)
            pool.type = ir.TensorType(ir.DataType.INT8)
            kind = f"{name[0]}_quant_type"
            node.attributes[kind] = ir.AttrString(kind, "PER_CHANNEL")


def _cache_scale(statistics: Statistics, observation: str, heads: int) -> NDArray[np.float32]:
    absmax = _observed(statistics, observation)
    return np.maximum(absmax, 1e-6).reshape(heads, 1, -1).astype(np.float32) / np.float32(127)
