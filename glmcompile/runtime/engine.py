"""The engine: requests in, steps of the whole batch, text out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from glmcompile.artifact import open_artifact
from glmcompile.errors import InputError
from glmcompile.families import supported
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.input_processor import InputProcessor, Prompt
from glmcompile.runtime.kv_cache import KVCacheShape
from glmcompile.runtime.model_runner import Limits, ModelRunner, cache_dtype
from glmcompile.runtime.request import Completion, Request, RequestOutput
from glmcompile.runtime.sampler import SamplingState, sample
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.runtime.scheduler import Scheduler
from glmcompile.runtime.sequence import Chunk, Sequence
from glmcompile.targets.cpu import default_threads, open_session

_PROMPT_FIELDS = tuple(option.name for option in fields(Prompt))


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened.

    threads: of every component's session; None means all usable cores.
    max_sequences: requests computed at once; further ones wait.
    max_batched_tokens: tokens a step computes; longer prompts are computed in chunks of this.
    kv_cache_bytes: memory for keys and values, taken as it is first used; at most as much as
        max_sequences full contexts need, and at least one block.
    block_size: tokens per cache block.
    prefix_caching: reuse the cache of shared prompt beginnings.
    encoder_cache_bytes: memory for features of recent images.
    verify: compare every file of the engine with its SHA-256 when opening.
    """

    threads: int | None = None
    max_sequences: int = 16
    max_batched_tokens: int = 2048
    kv_cache_bytes: int = 1 << 30
    block_size: int = 32
    prefix_caching: bool = True
    encoder_cache_bytes: int = 256 << 20
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batched_tokens", "kv_cache_bytes", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


class Engine:
    """A loaded model that serves many requests together.

    `add_request`, `cancel`, `generate` and `stream` may be called from any thread. Somebody has to
    call `step`; `generate` and `stream` do so themselves while they wait.
    """

    def __init__(self, path: str | Path, options: EngineOptions | None = None) -> None:
        """Open an engine directory. Raises ArtifactError (see open_artifact)."""
        options = options or EngineOptions()
        artifact = open_artifact(path, options.verify)
        self.path, self.manifest, self.model = artifact.path, artifact.manifest, artifact.model
        self.options = options
        family = supported()[self.model.family]
        self._inputs = InputProcessor(artifact.path, family, self.model)
        threads = options.threads or default_threads()
        sessions = {
            component: open_session(artifact.graph(component), threads)
            for component in artifact.components
        }
        cache = KVCacheShape.of(self.model, options.block_size, cache_dtype(sessions["decoder"]))
        context_blocks = -(-self.model.context_length // options.block_size)
        most = options.max_sequences * context_blocks
        num_blocks = max(1, min(most, options.kv_cache_bytes // cache.block_bytes))
        self.num_blocks, self.cache_bytes = num_blocks, num_blocks * cache.block_bytes
        self._blocks = BlockManager(num_blocks, options.block_size, options.prefix_caching)
        self._scheduler = Scheduler(self._blocks, options.max_batched_tokens, options.max_sequences)
        limits = Limits(
            options.max_batched_tokens, options.max_sequences, min(num_blocks, context_blocks)
        )
        self._runner: ModelRunner | None = ModelRunner(
            sessions, family, self.model, cache, num_blocks, limits, options.encoder_cache_bytes
        )
        # Guards what other threads hand in, the next five; re-entrant because a stream that the
        # garbage collector drops cancels its request, wherever that happens.
        self._lock = threading.RLock()
        self._next_id = 0
        self._arrivals: deque[Request] = deque()
        self._cancelled: set[int] = set()
        self._requests: dict[int, Request] = {}
        self._streams: dict[int, deque[RequestOutput]] = {}
        self._step_lock = threading.Lock()  # held by the thread that steps; guards the next
        self._undelivered: list[RequestOutput] = []  # of steps that a waiting stream made

    def add_request(self, sampling: SamplingParams | None = None, **request: Any) -> int:
        """Queue a request and return its id; `step` reports its outputs.

        request: the fields of Prompt, and unless `sampling` is given those of SamplingParams.
        Text and images are processed here, in the calling thread.
        Raises InputError for anything that cannot be served.
        """
        return self._add(self._prepare(sampling, request), stream=None)

    def cancel(self, id: int) -> None:
        """End a request at the next step, with what it has; finished ids are ignored."""
        with self._lock:
            if id in self._requests:
                self._cancelled.add(id)

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or an output of one is still to be had from `step`."""
        with self._lock:
            return bool(self._requests or self._undelivered)

    @property
    def graph_seconds(self) -> float:
        """Time that steps spent in embedding and decoder so far; what is left of it is Python's."""
        return self._open_runner().graph_seconds

    def step(self) -> list[RequestOutput]:
        """Schedule, run, postprocess: advance every running request by one decoder call.

        Returns what the step gave each request, those of generate and stream left out. A step with
        nothing to do returns at once.
        """
        with self._step_lock:
            self._open_runner()
            earlier, self._undelivered = self._undelivered, []
            return earlier + self._step()

    def generate(self, sampling: SamplingParams | None = None, **request: Any) -> Completion:
        """Answer one request, for arguments see add_request; blocks until it is finished."""
        with self.stream(sampling, **request) as stream:
            return stream.finish()

    def generate_many(self, requests: Items[Mapping[str, Any]]) -> list[Completion]:
        """Answer requests (each the arguments of add_request) together, in their order."""
        streams: list[TextStream] = []
        try:
            streams.extend(self.stream(**request) for request in requests)
            return [stream.finish() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, sampling: SamplingParams | None = None, **request: Any) -> TextStream:
        """Answer one request piece by piece, for arguments see add_request."""
        outputs: deque[RequestOutput] = deque()
        return TextStream(self, self._add(self._prepare(sampling, request), outputs), outputs)

    def clear_caches(self) -> None:
        """Forget cached prefixes and image features, as a benchmark wants between requests."""
        with self._step_lock:
            self._blocks.reset_cache()
            self._open_runner().clear_encoder_cache()

    def close(self) -> None:
        """Release sessions and caches; running requests are lost."""
        with self._step_lock:
            self._runner = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prepare(self, sampling: SamplingParams | None, request: dict[str, Any]) -> Request:
        arrived = time.perf_counter()
        prompt = Prompt(**{name: request.pop(name) for name in _PROMPT_FIELDS if name in request})
        if sampling is not None and request:
            raise InputError(f"sampling is given, and the option {next(iter(request))!r}, too")
        params = sampling or SamplingParams.from_options(request)
        params.check_vocabulary(self.model.vocab_size)
        ready = self._inputs(prompt)
        room = self.model.context_length - len(ready.token_ids)
        sequence = Sequence(
            id=-1,
            token_ids=ready.token_ids,
            params=params,
            positions=ready.positions,
            position_offset=ready.position_offset,
            max_tokens=min(params.max_tokens or room, room),
            images=ready.images,
        )
        self._scheduler.fit(sequence)
        ends = () if params.ignore_eos else self.model.eos_token_ids
        end_ids = frozenset((*ends, *params.stop_token_ids))
        return Request(
            sequence,
            SamplingState(params, ready.token_ids, end_ids),
            self._inputs.prompts.detokenizer(params.stop),
            end_ids,
            arrived,
        )

    def _add(self, request: Request, stream: deque[RequestOutput] | None) -> int:
        self._open_runner()
        with self._lock:
            id = request.sequence.id = self._next_id
            self._next_id += 1
            self._requests[id] = request
            self._arrivals.append(request)
            if stream is not None:
                self._streams[id] = stream
        return id

    def _step(self) -> list[RequestOutput]:
        outputs = self._take_in()
        chunks = self._scheduler.schedule()
        if chunks:
            outputs += self._run(chunks)
        return self._deliver(outputs)

    def _take_in(self) -> list[RequestOutput]:
        """Hand arrivals to the scheduler and take cancelled requests out."""
        with self._lock:
            arrivals, self._arrivals = self._arrivals, deque()
            cancelled, self._cancelled = self._cancelled, set()
            ended = [self._requests[id] for id in sorted(cancelled) if id in self._requests]
        for request in arrivals:
            self._scheduler.add(request.sequence)
        return [self._end(request, "cancelled") for request in ended]

    def _run(self, chunks: list[Chunk]) -> list[RequestOutput]:
        requests = [self._requests[chunk.sequence.id] for chunk in chunks]
        now = time.perf_counter()
        for request in requests:
            request.started = request.started or now
        try:
            logits, vision_seconds = self._open_runner().run(chunks)
        except Exception as error:
            # The caches may be half written; nothing of this step is committed.
            for request in requests:
                self._scheduler.remove(request.sequence)
            return [RequestOutput(request.sequence.id, error=error) for request in requests]
        self._scheduler.complete(chunks)
        for request, seconds in zip(requests, vision_seconds, strict=True):
            request.vision += seconds
        choosing = [r for r, chunk in zip(requests, chunks, strict=True) if chunk.samples]
        tokens = sample(logits, [request.sampling for request in choosing])
        outputs = []
        for request, sampled in zip(choosing, tokens, strict=True):
            if isinstance(sampled, Exception):
                self._scheduler.remove(request.sequence)
                outputs.append(RequestOutput(request.sequence.id, error=sampled))
                continue
            text, reason = request.accept(sampled)
            given = (sampled.token,)
            if reason is not None:
                outputs.append(self._end(request, reason, text, given))
            else:
                outputs.append(RequestOutput(request.sequence.id, text, given))
        return outputs

    def _end(
        self, request: Request, reason: str, text: str = "", token_ids: tuple[int, ...] = ()
    ) -> RequestOutput:
        self._scheduler.remove(request.sequence)
        return RequestOutput(request.sequence.id, text, token_ids, request.completion(reason))

    def _deliver(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Drop finished requests, put streamed outputs into their streams, return the others."""
        returned = []
        with self._lock:
            for output in outputs:
                stream = self._streams.get(output.id)
                if output.finished:
                    del self._requests[output.id]
                    self._streams.pop(output.id, None)
                if stream is None:
                    returned.append(output)
                else:
                    stream.append(output)
        return returned

    def _wait(self, outputs: deque[RequestOutput]) -> RequestOutput:
        """The next output of a stream; steps while there is none and nobody else does."""
        while not outputs:
            with self._step_lock:
                if not outputs:
                    self._open_runner()
                    self._undelivered.extend(self._step())
        return outputs.popleft()

    def _open_runner(self) -> ModelRunner:
        if self._runner is None:
            raise InputError(f"{self.path}: the engine is closed; load it again")
        return self._runner


class TextStream(Iterator[str]):
    """The pieces of one answer's text; `completion` is there when they end.

    Closing it, or dropping it, cancels what is left.
    """

    def __init__(self, engine: Engine, id: int, outputs: deque[RequestOutput]) -> None:
        self.id = id
        self.completion: Completion | None = None
        self._engine = engine
        self._outputs = outputs
        self._open = True

    def __next__(self) -> str:
        while self._open:
            output = self._engine._wait(self._outputs)
            self._open = not output.finished
            self.completion = output.completion
            if output.error is not None:
                raise output.error
            if output.text:
                return output.text
        raise StopIteration

    def finish(self) -> Completion:
        """Run to the end and return the completion."""
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    def close(self) -> None:
        if self._open:
            self._open = False
            self._engine.cancel(self.id)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
