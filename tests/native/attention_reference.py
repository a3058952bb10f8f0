"""Float64 references of PagedAttention and VarlenAttention, and sessions of one node to compare."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from glmcompile.native import library_path

Array = NDArray[Any]

# Values of GLMCOMPILE_ISA; one the processor lacks selects the best kernel below it.
ISAS = ("portable", "avx2", "avx512")

# Largest difference from float64, relative to the largest value attended.
FLOAT32_TOLERANCE = 2e-6  # float32 rounding of sums over keys and channels
# Queries and probabilities of 8 bits, in the worst element; compute_type int8 rounds keys and
# values, too. Other instruction sets than AVX-512 compute in float32.
INT8_TOLERANCE = 2e-2
# Root mean square error of attention over an int8 cache, relative to what rounding the cache costs.
INT8_CACHE_ERROR_RATIO = 1.5

PAGED_INPUTS = [
    "query",
    "key",
    "value",
    "key_cache",
    "value_cache",
    "cumulative_sequence_length",
    "past_seqlens",
    "block_table",
    "cos_cache",
    "sin_cache",
    "slot_mapping",
    "head_sink",
    "q_norm_weight",
    "k_norm_weight",
    "k_scale",
    "v_scale",
    "attention_metadata",
]
# Those of com.glmcompile::PagedAttention, which is com.microsoft's with more of them.
EXTENDED_INPUTS = [*PAGED_INPUTS, "attend_span", "alibi_slopes"]

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}


def int8_tolerance(isa: str) -> float:
    """Tolerance of attention over given int8 keys and values."""
    return INT8_TOLERANCE if isa in ("", "avx512") else FLOAT32_TOLERANCE


def session(
    op: str,
    domain: str,
    inputs: Sequence[str],
    feed: Mapping[str, Array],
    attributes: Mapping[str, Any],
    outputs: Mapping[str, int],
    isa: str = "",
    threads: int = 2,
) -> ort.InferenceSession:
    """A session of one node whose graph inputs are those of `inputs` present in `feed`."""
    names = [name if name in feed else "" for name in inputs]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(op, names, list(outputs), domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "test",
        [
            helper.make_tensor_value_info(n, _TYPES[feed[n].dtype], [None] * feed[n].ndim)
            for n in names
            if n
        ],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()],
    )
    versions = [helper.make_opsetid("", 23), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    with mock.patch.dict(os.environ, {"GLMCOMPILE_ISA": isa}):
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def run_paged(
    feed: Mapping[str, Array], attributes: Mapping[str, Any], isa: str = "", threads: int = 2
) -> tuple[Array, Array, Array]:
    """(output, key cache, value cache) after one call; the caches are updated in place.

    The operator is ONNX Runtime's, or com.glmcompile's where the feed has an input that only that
    one knows.
    """
    extended = not feed.keys() <= set(PAGED_INPUTS)
    paged = session(
        "PagedAttention",
        "com.glmcompile" if extended else "com.microsoft",
        EXTENDED_INPUTS if extended else PAGED_INPUTS,
        feed,
        attributes,
        {"output": TensorProto.FLOAT},
        isa,
        threads,
    )
    return run_paged_session(paged, feed)


def run_paged_session(
    paged: ort.InferenceSession, feed: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    binding = paged.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    paged.run_with_iobinding(binding)
    output = binding.copy_outputs_to_cpu()[0]
    return output, values["key_cache"].numpy().copy(), values["value_cache"].numpy().copy()


def run_varlen(
    feed: Mapping[str, Array], attributes: Mapping[str, Any], isa: str = "", threads: int = 2
) -> Array:
    varlen = session(
        "VarlenAttention",
        "com.glmcompile",
        ("query", "key", "value", "cu_seqlens", "cu_seqlens_k"),
        feed,
        attributes,
        {"output": TensorProto.FLOAT},
        isa,
        threads,
    )
    return varlen.run(None, dict(feed))[0]


def attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    scale: float,
    softcap: float,
    sink: Any,
    bias: Any = 0.0,
) -> Array:
    """One head: query [q, d], key and value [k, d], visible [q, k]; 0 for a row without keys.

    bias: [q, k], added to the capped scores.
    """
    scores = query @ key.T * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores + bias, -np.inf)
    top = scores.max(axis=1, initial=-1e30 if sink is None else max(sink, -1e30))[:, None]
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    return weights @ value / np.where(total == 0, 1, total)


def varlen_reference(
    feed: Mapping[str, Array],
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
) -> Array:
    """[tokens, heads * v_head_size], float64."""
    query, key, value = (
        feed[name].astype(np.float64).reshape(len(feed[name]), n, feed[name].shape[1] // n)
        for name, n in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    )
    output = np.zeros((len(query), heads, value.shape[-1]))
    cu_q = feed["cu_seqlens"]
    cu_k = feed.get("cu_seqlens_k", cu_q)
    for i in range(len(cu_q) - 1):
        q, k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        seen = np.ones((q.stop - q.start, k.stop - k.start), bool)
        if causal:
            seen = np.tril(seen, seen.shape[1] - seen.shape[0])
        for head in range(heads):
            kv = head // (heads // kv_heads)
            output[q, head] = attend(
                query[q, head], key[k, kv], value[k, kv], seen, scale, softcap, None
            )
    return output.reshape(len(query), heads * output.shape[-1])


def transform_heads(
    heads: Array, positions: Array, feed: Mapping[str, Array], norm: str, a: Mapping[str, Any]
) -> Array:
    """QK-Norm, then rotary embedding, of heads [tokens, heads, head_size] at their positions."""
    heads = heads.astype(np.float64)
    if norm in feed:
        mean = (heads**2).mean(axis=-1, keepdims=True)
        heads = heads / np.sqrt(mean + a.get("qk_norm_epsilon", 1e-6)) * feed[norm]
    if not a.get("do_rotary"):
        return heads
    cos, sin = (feed[n].astype(np.float64)[positions][:, None] for n in ("cos_cache", "sin_cache"))
    half, offset = cos.shape[-1], a.get("rotary_offset", 0)
    span = heads[..., offset : offset + 2 * half]
    if a.get("rotary_interleaved"):
        x, y = span[..., 0::2], span[..., 1::2]
        rotated = np.stack([x * cos - y * sin, y * cos + x * sin], axis=-1).reshape(span.shape)
    else:
        x, y = span[..., :half], span[..., half:]
        rotated = np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
    out = heads.copy()
    out[..., offset : offset + 2 * half] = rotated
    return out


def split_query(feed: Mapping[str, Array], a: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """query, key, value as [tokens, heads, head_size], from packed or separate inputs."""
    heads, kv_heads = a["num_heads"], a["kv_num_heads"]
    size, v_size = feed["key_cache"].shape[-1], feed["value_cache"].shape[-1]
    if "key" in feed:
        query, key, value = feed["query"], feed["key"], feed["value"]
    else:
        ends = np.cumsum([heads * size, kv_heads * size])
        query, key, value = np.split(feed["query"], ends, axis=1)
    tokens = len(query)
    return (
        query.reshape(tokens, heads, size),
        key.reshape(tokens, kv_heads, size),
        value.reshape(tokens, kv_heads, v_size),
    )


def positions_and_slots(feed: Mapping[str, Array]) -> tuple[Array, Array]:
    """Position in its sequence, and cache slot or -1, of every token of the batch."""
    block_size = feed["key_cache"].shape[1]
    positions, slots = [], []
    ends = feed["cumulative_sequence_length"]
    for i, past in enumerate(feed["past_seqlens"]):
        for position in range(past, past + ends[i + 1] - ends[i]):
            block = feed["block_table"][i, position // block_size]
            positions.append(position)
            slots.append(-1 if block < 0 else block * block_size + position % block_size)
    chosen = feed.get("slot_mapping", np.array(slots, np.int64))
    return np.array(positions, np.int64), chosen


def expected_caches(feed: Mapping[str, Array], a: Mapping[str, Any]) -> tuple[Array, Array]:
    """The caches after the new tokens are stored, as float64 numbers before any int8 rounding."""
    _, key, value = split_query(feed, a)
    positions, slots = positions_and_slots(feed)
    key = transform_heads(key, positions, feed, "k_norm_weight", a)
    caches = []
    for name, new, scale in (("key_cache", key, "k_scale"), ("value_cache", value, "v_scale")):
        cache = feed[name].astype(np.float64)
        flat = cache.reshape(-1, *cache.shape[2:])
        if scale in feed:
            new = np.clip(new / feed[scale].reshape(-1, feed[scale].shape[-1]), -128, 127)
        flat[slots[slots >= 0]] = new[slots >= 0]
        caches.append(cache)
    return caches[0], caches[1]


def paged_reference(
    feed: Mapping[str, Array], a: Mapping[str, Any], key_cache: Array, value_cache: Array
) -> Array:
    """[tokens, heads * v_head_size] float64, attending the caches as they are after the update."""
    heads, kv_heads, size = a["num_heads"], a["kv_num_heads"], key_cache.shape[-1]
    block_size = key_cache.shape[1]
    query, _, _ = split_query(feed, a)
    positions, _ = positions_and_slots(feed)
    query = transform_heads(query, positions, feed, "q_norm_weight", a)
    keys, values = (
        cache.astype(np.float64) * (feed[s].reshape(-1, feed[s].shape[-1]) if s in feed else 1)
        for cache, s in ((key_cache, "k_scale"), (value_cache, "v_scale"))
    )
    output = np.zeros((*query.shape[:2], value_cache.shape[-1]))
    ends = feed["cumulative_sequence_length"]
    for i, past in enumerate(feed["past_seqlens"]):
        tokens = slice(ends[i], ends[i + 1])
        total = past + ends[i + 1] - ends[i]
        at = np.arange(total)
        blocks = feed["block_table"][i, at // block_size]
        mapped = (blocks >= 0)[:, None, None]
        key, value = (np.where(mapped, x[blocks, at % block_size], 0) for x in (keys, values))
        distance = np.arange(past, total)[:, None] - at
        visible = np.broadcast_to(blocks >= 0, distance.shape)
        if a.get("is_causal", 1):
            visible = visible & (distance >= 0)
        if a.get("local_window_size", -1) > 0:
            visible = visible & (distance < a["local_window_size"])
        if "attend_span" in feed:
            first, end = feed["attend_span"][tokens].T[:, :, None]
            visible = visible | ((at >= first) & (at < end) & (blocks >= 0))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            sink = float(feed["head_sink"][head]) if "head_sink" in feed else None
            scale = a.get("scale") or size**-0.5
            slope = float(feed["alibi_slopes"][head]) if "alibi_slopes" in feed else 0.0
            output[tokens, head] = attend(
                query[tokens, head], key[:, kv], value[:, kv], visible, scale,
                a.get("softcap", 0.0), sink, -slope * distance,
            )  # fmt: skip
    return output.reshape(len(query), heads * output.shape[-1])


def assert_close(actual: Array, expected: Array, values: Array, tolerance: float) -> None:
    """Compares relative to the largest of the values attended, which bounds every output."""
    assert actual.shape == expected.shape
    bound = tolerance * max(1.0, float(np.abs(values).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
