"""The engine's core: one thread, no locks; every step schedules, runs and postprocesses.

A failure belongs to the request that caused it: a step that raises is run again, then in halves,
until only what fails alone is left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import ComputeError, DeadlineError
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.encoder import Encoded, EncoderCache, ImageEncoder
from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.model_runner import ModelRunner
from glmcompile.runtime.pacer import Pacer
from glmcompile.runtime.request import Request, RequestOutput
from glmcompile.runtime.sampler import Sampled, sample
from glmcompile.runtime.scheduler import Schedule, Scheduler
from glmcompile.runtime.sequence import Chunk
from glmcompile.runtime.stats import Counters

# Steps that fail one after the other before the engine calls itself unwell.
_UNWELL_AFTER = 3

Choice = Sampled | Exception | None


class EngineCore:
    """Computes requests together, a step at a time.

    Every method belongs to one thread. Images are encoded beside the steps, on the encoder's own
    thread; `is_blocked` tells that nothing else is left to do until it has finished one.
    """

    def __init__(
        self,
        runner: ModelRunner,
        encoder: ImageEncoder | None,
        blocks: BlockManager,
        max_batched_tokens: int,
        max_sequences: int,
        encoder_cache_bytes: int,
    ) -> None:
        """encoder: None for a text model."""
        self.runner, self.encoder, self.blocks = runner, encoder, blocks
        self.scheduler = Scheduler(blocks, max_batched_tokens, max_sequences, self._is_encoded)
        self.encoder_cache = EncoderCache(encoder_cache_bytes)
        self.counters = Counters()
        self.last_step = (0, 0.0)  # tokens computed and seconds
        self._requests: dict[int, Request] = {}
        self._outputs: list[RequestOutput] = []  # not returned by a step yet
        self._features: dict[bytes, NDArray[np.float32]] = {}  # that running sequences want
        self._failed_images: set[bytes] = set()  # once; the second time is the last
        self._failed_in_a_row = 0
        self._pacer = Pacer()
        self._pause = 0.0  # seconds that the encoder gets before the next step
        self._starved = False

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or an output of one is still to be had from `step`."""
        return bool(self._requests or self._outputs)

    @property
    def is_blocked(self) -> bool:
        """Whether a step could do nothing before the encoder has finished an image."""
        return self._starved and self.encoder is not None and self.encoder.is_working

    @property
    def healthy(self) -> bool:
        """False once several steps in a row have failed, until one succeeds."""
        return self._failed_in_a_row < _UNWELL_AFTER

    def add(self, request: Request) -> None:
        """Queue a request whose sequence fits (Scheduler.fit) and has an id of its own."""
        self._requests[request.sequence.id] = request
        self.scheduler.add(request.sequence)
        self._starved = False

    def cancel(self, id: int) -> None:
        """End a request with what it has; ids that are not there are ignored."""
        if id in self._requests:
            self._end(self._requests[id], "cancelled")
            self._starved = False

    def step(self) -> list[RequestOutput]:
        """Advance every running request by one decoder call; returns what each was given."""
        plan = self._schedule()
        choices = self._run(plan.chunks)
        return self._postprocess(plan.chunks, choices)

    def abort(self, error: Exception) -> list[RequestOutput]:
        """End every request with `error`."""
        for request in list(self._requests.values()):
            self._fail(request, error)
        return self._take_outputs()

    def close(self) -> None:
        """Let go of sessions and pools; nothing can be computed afterwards."""
        if self.encoder is not None:
            self.encoder.close()
        del self.runner

    def clear_caches(self) -> None:
        """Forget cached prefixes and image features, as a benchmark wants between requests."""
        self.blocks.reset_cache()
        self.encoder_cache.clear()

    def check_integrity(self) -> None:
        """Every block is free, cached or owned, once. Raises AssertionError naming one that is not.

        Meant for tests, between steps.
        """
        self.blocks.check_integrity([request.sequence for request in self._requests.values()])
        assert len(self._requests) == len(self.scheduler.running) + len(self.scheduler.waiting)
        assert self._requests or not self._features, "features are kept that nobody wants"

    def _schedule(self) -> Schedule:
        """What to compute now; the encoder is told which images come next."""
        if self.encoder is not None:
            if self._pause:
                self.encoder.wait(self._pause)
            for encoded in self.encoder.take():
                self._accept_image(encoded)
        self._end_late()
        running = set(self.scheduler.running)
        decoding = any(sequence.is_decoding for sequence in running)
        plan = self.scheduler.schedule(self._pacer.prefill_tokens(decoding))
        self.counters.preemptions += len(running.difference(self.scheduler.running))
        now = time.perf_counter()
        for sequence in plan.admitted:
            self._admit(self._requests[sequence.id], now)
        if self.encoder is not None:
            self.encoder.want(plan.images)
        self._starved = not plan.chunks
        return plan

    def _run(self, chunks: Sequence[Chunk]) -> list[Choice]:
        """The token chosen for each chunk: None where none is due, an error for what failed."""
        began = time.perf_counter()
        failures = self.counters.failed_steps
        choices = self._attempt(chunks) if chunks else []
        seconds = time.perf_counter() - began
        tokens = sum(chunk.count for chunk in chunks)
        self.last_step = (tokens, seconds)
        self._pause = 0.0
        if chunks:
            self.counters.steps += 1
            if self.counters.failed_steps > failures:
                self._failed_in_a_row += 1
            else:
                self._failed_in_a_row = 0
                decoded = sum(chunk.count for chunk in chunks if chunk.sequence.is_decoding)
                self._pacer.observe(decoded, tokens - decoded, seconds)
            if self.encoder is not None and self.encoder.is_working:
                decoding = any(chunk.sequence.is_decoding for chunk in chunks)
                self._pause = self._pacer.pause(seconds, decoding)
        return choices

    def _attempt(self, chunks: Sequence[Chunk]) -> list[Choice]:
        """Run chunks together; what fails twice is halved until the request at fault is alone."""
        for _ in range(2):
            try:
                logits = self.runner.run(chunks, self._features)
            except Exception as raised:
                self.counters.failed_steps += 1
                cause = raised
            else:
                return self._choose(chunks, logits)
        if len(chunks) > 1:
            half = len(chunks) // 2
            return self._attempt(chunks[:half]) + self._attempt(chunks[half:])
        error = ComputeError(f"computing the request failed twice ({cause!r})")
        error.__cause__ = cause
        return [error]

    def _choose(self, chunks: Sequence[Chunk], logits: NDArray[np.float32]) -> list[Choice]:
        states = [self._requests[chunk.sequence.id].sampling for chunk in chunks if chunk.samples]
        chosen = iter(sample(logits, states))
        return [next(chosen) if chunk.samples else None for chunk in chunks]

    def _postprocess(
        self, chunks: Sequence[Chunk], choices: Sequence[Choice]
    ) -> list[RequestOutput]:
        """Record what was computed, turn tokens into text, end what has ended."""
        for chunk, choice in zip(chunks, choices, strict=True):
            request = self._requests[chunk.sequence.id]
            if isinstance(choice, Exception):
                self._fail(request, choice)
                continue
            self.scheduler.complete(chunk)
            if choice is None:
                continue
            try:
                output, reason = request.accept(choice)
            except Exception as error:
                self._fail(request, error)
                continue
            self.counters.generation_tokens += len(output.token_ids)
            if reason is None:
                self._outputs.append(output)
            else:
                self._end(request, reason, output)
        self._drop_features()
        return self._take_outputs()

    def _admit(self, request: Request, now: float) -> None:
        """Count a request that was given blocks; of a preempted one, only the first time."""
        if request.started is not None:
            return
        request.started = now
        sequence, counters = request.sequence, self.counters
        counters.prompt_tokens += sequence.num_prompt_tokens
        counters.cached_tokens += sequence.num_cached_tokens or 0
        for span in sequence.images:
            counters.encoder_cache_queries += 1
            reused = span.end <= sequence.num_computed_tokens
            counters.encoder_cache_hits += reused or self._is_encoded(span.image)

    def _is_encoded(self, image: ProcessedImage) -> bool:
        """Whether an image's features are there; from now on they stay while they are wanted."""
        if image.digest not in self._features:
            features = self.encoder_cache.get(image.digest)
            if features is None:
                return False
            self._features[image.digest] = features
        return True

    def _accept_image(self, encoded: Encoded) -> None:
        """Keep an image's features; one that failed is encoded again, then its requests fail."""
        digest = encoded.image.digest
        waiting = [
            self._requests[sequence.id]
            for sequence in self.scheduler.running
            if any(span.image.digest == digest for span in sequence.pending_images)
        ]
        if encoded.features is not None:
            self._failed_images.discard(digest)
            self._failed_in_a_row = 0
            self.counters.encoded_images += 1
            self.encoder_cache.put(digest, encoded.features)
            if waiting:
                self._features[digest] = encoded.features
            for request in waiting:
                request.vision += encoded.seconds
            return
        self.counters.failed_steps += 1
        self._failed_in_a_row += 1
        if digest not in self._failed_images:
            self._failed_images.add(digest)
            return
        self._failed_images.discard(digest)
        error = ComputeError(f"encoding an image failed twice ({encoded.error!r})")
        error.__cause__ = encoded.error
        for request in waiting:
            self._fail(request, error)

    def _drop_features(self) -> None:
        """Forget features whose tokens are all computed; the cache may still have them."""
        if self._features:
            wanted = {
                span.image.digest
                for sequence in self.scheduler.running
                for span in sequence.pending_images
            }
            for digest in self._features.keys() - wanted:
                del self._features[digest]

    def _end_late(self) -> None:
        """End the requests whose time is up."""
        now = time.perf_counter()
        for request in [one for one in self._requests.values() if one.is_late(now)]:
            count = request.sequence.num_answer_tokens
            error = DeadlineError(
                f"the request did not finish within its time-out of {request.timeout:g} s; "
                f"its answer had {count} tokens"
            )
            self._fail(request, error)

    def _end(self, request: Request, reason: str, last: RequestOutput | None = None) -> None:
        output = last or RequestOutput(request.sequence.id)
        self._outputs.append(replace(output, completion=request.completion(reason)))
        self._remove(request)

    def _fail(self, request: Request, error: Exception) -> None:
        self._outputs.append(RequestOutput(request.sequence.id, error=error))
        self._remove(request)

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request.sequence)
        del self._requests[request.sequence.id]
        self._drop_features()

    def _take_outputs(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs
