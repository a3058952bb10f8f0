"""Runs the component graphs: packs a step's tokens, binds buffers and caches, returns logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.contract import (
    BLOCK_TABLE,
    FEATURE_ROWS,
    FEATURES,
    IMAGE_SPANS,
    KEY_CACHE,
    LOGITS_ROWS,
    PAST_LENGTHS,
    POSITIONS,
    SEQUENCE_ENDS,
    TOKEN_IDS,
    Contract,
)
from glmcompile.errors import ArtifactError
from glmcompile.rules import span_rows
from glmcompile.runtime.kv_cache import KVCacheShape
from glmcompile.runtime.sequence import Chunk

_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class Limits:
    """The largest step: tokens and sequences in it, and blocks of one sequence."""

    max_tokens: int
    max_sequences: int
    max_blocks_per_sequence: int


class ModelRunner:
    """Owns the sessions, the KV pools and every buffer a step needs.

    Buffers are allocated once, for the largest step, and bound to the graphs by address: a step
    copies its integers in and reads logits in place. ONNX Runtime keeps no reference to bound
    memory, so this object does.
    """

    def __init__(
        self,
        decoder: ort.InferenceSession,
        model: Contract,
        cache: KVCacheShape,
        num_blocks: int,
        limits: Limits,
    ) -> None:
        self._decoder = _Binding(decoder)
        self._model = model
        self._names = {port.role: port.name for port in model.decoder.inputs}
        self.cache_bytes = num_blocks * cache.block_bytes
        tokens, sequences = limits.max_tokens, limits.max_sequences
        self._input_ids = np.empty(tokens, np.int64)
        self._positions = np.empty(model.position_axes * tokens, np.int64)
        self._cumulative = np.zeros(sequences + 1, np.int32)
        self._past = np.empty(sequences, np.int32)
        self._table = np.empty(sequences * limits.max_blocks_per_sequence, np.int32)
        self._rows = np.empty(sequences, np.int64)
        self._spans = np.empty((tokens, 2), np.int32) if IMAGE_SPANS in self._names else None
        self._logits = np.empty((sequences, model.vocab_size), np.float32)
        features = model.decoder.input(FEATURES)
        width = int(features.shape[-1]) if features is not None else 0
        self._no_features = np.empty((0, width), np.float32)
        for name, pool in cache.pools(num_blocks):
            self._decoder.input(name, pool)

    def run(
        self, chunks: Sequence[Chunk], features: Mapping[bytes, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Compute a step: fill the chunks' cache slots and give the logits of those that sample.

        features: float32 [image tokens, width] of every image in the chunks, by its digest.
        Returns logits float32 [chunks that sample, vocab], which the next call overwrites. Running
        the same chunks again writes the same slots, so a call that failed may be repeated.
        """
        self._pack(chunks)
        if self._model.vision is not None:
            image_features, rows = self._image_features(chunks, features)
            self._bind(FEATURES, image_features)
            self._bind(FEATURE_ROWS, rows)
        logits = self._logits[: sum(chunk.samples for chunk in chunks)]
        self._decoder.output("logits", logits)
        self._decoder.run()
        return logits

    @property
    def graph_seconds(self) -> float:
        """Time spent in the decoder's graph since it was opened."""
        return self._decoder.seconds

    def _bind(self, role: str, array: NDArray[Any]) -> None:
        self._decoder.input(self._names[role], array)

    def _pack(self, chunks: Sequence[Chunk]) -> None:
        """Write the decoder's integer inputs."""
        total = sum(chunk.count for chunk in chunks)
        axes = self._model.position_axes
        positions = self._positions[: axes * total].reshape(axes, total)
        width = max(len(chunk.sequence.block_table) for chunk in chunks)
        table = self._table[: len(chunks) * width].reshape(len(chunks), width)
        table.fill(-1)
        row = sampled = 0
        for index, chunk in enumerate(chunks):
            sequence, end = chunk.sequence, row + chunk.count
            self._input_ids[row:end] = sequence.token_ids[chunk.start : chunk.end]
            prompt = min(max(sequence.num_prompt_tokens - chunk.start, 0), chunk.count)
            positions[:, row : row + prompt] = sequence.positions[
                :, chunk.start : chunk.start + prompt
            ]
            if prompt < chunk.count:
                answer = np.arange(chunk.start + prompt, chunk.end) + sequence.position_offset
                positions[:, row + prompt : end] = answer
            table[index, : len(sequence.block_table)] = sequence.block_table
            self._past[index] = chunk.start
            self._cumulative[index + 1] = end
            if chunk.samples:
                self._rows[sampled] = end - 1
                sampled += 1
            if self._spans is not None:
                self._spans[row:end] = span_rows(list(sequence.whole), chunk.start, chunk.end)
            row = end
        if self._spans is not None:
            self._bind(IMAGE_SPANS, self._spans[:total])
        self._bind(TOKEN_IDS, self._input_ids[:total])
        self._bind(POSITIONS, positions if axes > 1 else positions[0])
        self._bind(BLOCK_TABLE, table)
        self._bind(PAST_LENGTHS, self._past[: len(chunks)])
        self._bind(SEQUENCE_ENDS, self._cumulative[: len(chunks) + 1])
        self._bind(LOGITS_ROWS, self._rows[:sampled])

    def _image_features(
        self, chunks: Sequence[Chunk], features: Mapping[bytes, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features of the image tokens in the chunks, and their rows among the packed tokens."""
        parts: list[NDArray[np.float32]] = []
        rows: list[NDArray[np.int64]] = []
        offset = 0
        for chunk in chunks:
            for span in chunk.sequence.images:
                taken, places = span.within(chunk.start, chunk.end)
                if len(places):
                    parts.append(features[span.image.digest][taken])
                    rows.append(places + (offset - chunk.start))
            offset += chunk.count
        if not parts:
            return self._no_features, _NO_ROWS
        if len(parts) == 1:
            return parts[0], rows[0]
        return np.concatenate(parts), np.concatenate(rows)


_NO_ROWS = np.empty(0, np.int64)


class _Binding:
    """One session's I/O binding, which keeps what it binds alive and rebinds only what changed."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._bound: dict[str, tuple[NDArray[Any], int]] = {}
        self.seconds = 0.0  # in `run`

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Let the graph read `array`, which must be contiguous, from the next run on."""
        self._bind(self._binding.bind_input, name, array)

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Let the graph write into `array`, which must have the output's very shape."""
        self._bind(self._binding.bind_output, name, array)

    def run(self) -> None:
        began = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.seconds += time.perf_counter() - began

    def _bind(self, bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
        address = array.ctypes.data
        bound = self._bound.get(name)
        if bound is None or bound[1] != address or bound[0].shape != array.shape:
            bind(name, "cpu", 0, array.dtype, array.shape, address)
            self._bound[name] = array, address


def cache_dtype(decoder: ort.InferenceSession) -> np.dtype[Any]:
    """The element type of a decoder's KV pools, or of those of some of its layers.

    Raises ArtifactError for one not known.
    """
    for node in decoder.get_inputs():
        if node.name.startswith(KEY_CACHE):
            if node.type in _DTYPES:
                return np.dtype(_DTYPES[node.type])
            raise ArtifactError(f"the decoder's KV cache is of {node.type}; expected float or int8")
    raise ArtifactError("the decoder has no input key_cache.0; compile the checkpoint again")
