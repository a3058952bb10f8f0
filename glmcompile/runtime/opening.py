"""Puts an engine's core together: sessions, KV pools, vision encoder."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime as ort

from glmcompile.artifact import Artifact
from glmcompile.contract import DECODER, STATE, VISION
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.core import EngineCore
from glmcompile.runtime.encoder import ImageEncoder
from glmcompile.runtime.kv_cache import KVCacheShape
from glmcompile.runtime.model_runner import Limits, ModelRunner, cache_dtype
from glmcompile.runtime.options import EngineOptions
from glmcompile.targets.cpu import default_threads, open_session


def open_core(
    artifact: Artifact, options: EngineOptions, on_encoded: Callable[[], None] = lambda: None
) -> EngineCore:
    """Open an artifact's components. on_encoded: called on the encoder's thread after each image.

    Raises ArtifactError for a decoder that no cache fits, NativeLibraryError.
    """
    model = artifact.model
    threads = options.threads or default_threads()

    def session(component: str) -> ort.InferenceSession:
        return open_session(artifact.graph(component), threads)

    decoder = session(DECODER)
    cache = KVCacheShape(model, options.block_size, cache_dtype(decoder))
    context_blocks = -(-options.context_length(model) // options.block_size)
    most = options.max_sequences * context_blocks
    num_blocks = max(1, min(most, options.kv_cache_bytes // max(1, cache.block_bytes)))
    limits = Limits(
        options.max_batched_tokens, options.max_sequences, min(num_blocks, context_blocks)
    )
    # Where all of a prompt sees all of it, no beginning of one is that of another; and a recurrent
    # layer's state at the end of a block is not kept.
    recurrent = bool(model.decoder.having(STATE))
    reuses = options.prefix_caching and model.spans != "whole_prompt" and not recurrent
    blocks = BlockManager(num_blocks, options.block_size, reuses)
    runner = ModelRunner(decoder, model, cache, num_blocks, limits)
    encoder = None
    if model.vision is not None:
        encoder = ImageEncoder(lambda: session(VISION), model, on_encoded)
    return EngineCore(
        runner,
        encoder,
        blocks,
        options.max_batched_tokens,
        options.max_sequences,
        options.encoder_cache_bytes,
    )
