"""The engine: an opened artifact that answers requests, from any thread and many at once."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from glmcompile.artifact import open_artifact
from glmcompile.errors import ClosedError, InputError
from glmcompile.runtime.core import EngineCore
from glmcompile.runtime.faults import Faults
from glmcompile.runtime.grammar_compiler import GrammarCompiler
from glmcompile.runtime.input_processor import InputProcessor, Prompt
from glmcompile.runtime.loop import EngineLoop
from glmcompile.runtime.media import OWN, InputPolicy
from glmcompile.runtime.opening import open_core
from glmcompile.runtime.options import EngineOptions
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.runtime.request import Completion, Request, RequestOutput
from glmcompile.runtime.sampler import SamplingState
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.runtime.sequence import Sequence
from glmcompile.runtime.stats import EngineStats, Observer

_PROMPT_FIELDS = tuple(option.name for option in fields(Prompt))


class Engine:
    """A loaded model that serves many requests together, each method from any thread.

    One thread of its own steps the model while there is work; callers only wait for their outputs.
    """

    def __init__(
        self,
        path: str | Path,
        options: EngineOptions | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Open an engine directory. observer: hears of steps and finished requests.

        Raises ArtifactError (see open_artifact).
        """
        self.options = options = options or EngineOptions()
        artifact = open_artifact(path, options.verify)
        self.path, self.manifest, self.model = artifact.path, artifact.manifest, artifact.model
        self.context_length = options.context_length(self.model)
        self._inputs = InputProcessor(artifact.path, self.model)
        self._grammars = GrammarCompiler(
            self._inputs.prompts.tokenizer, self.model.vocab_size, self.model.eos_token_ids
        )
        core = open_core(artifact, options, on_encoded=self._wake)
        self.num_blocks, self.cache_bytes = core.blocks.num_blocks, core.runner.cache_bytes
        Faults.parse(options.faults).inject(core.runner, core.encoder, self._inputs)
        self._core: EngineCore | None = core  # from here on for its constants alone
        self._loop: EngineLoop = EngineLoop(core, options.capacity, self._probe, observer)
        self._loop.start()

    @property
    def prompts(self) -> PromptBuilder:
        """Tokenizer and chat template."""
        return self._inputs.prompts

    def prepare(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        policy: InputPolicy = OWN,
        shown: Collection[str] = (),
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """Process text and images in the calling thread; what comes of it is for `submit`, once.

        policy: what the prompt may hold. shown: special tokens that stand in the answer's text.
        priority: the lower, the earlier it is admitted. timeout: seconds from now after which the
        request ends with a DeadlineError.
        Raises InputError for anything that cannot be served.
        """
        (request,) = self.prepare_several(
            prompt,
            [sampling or SamplingParams()],
            policy=policy,
            shown=shown,
            priority=priority,
            timeout=timeout,
        )
        return request

    def prepare_several(
        self,
        prompt: Prompt,
        samplings: Items[SamplingParams],
        *,
        policy: InputPolicy = OWN,
        shown: Collection[str] = (),
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[Request]:
        """Like `prepare`, for an answer by each of `samplings`; the prompt is processed once."""
        arrived = time.perf_counter()
        core = self._opened()
        for params in samplings:
            params.check_vocabulary(self.model.vocab_size)
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout is {timeout!r}; expected seconds above 0")
        # Before the prompt: a grammar that is wrong is found sooner than an image is decoded.
        grammars = [
            None if params.grammar is None else self._grammars(params.grammar)
            for params in samplings
        ]
        ready = self._inputs(prompt, policy)
        room = self.context_length - len(ready.token_ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(ready.token_ids)} tokens but the context was limited to "
                f"{self.context_length}, answer included; shorten the prompt"
            )
        requests = []
        for params, grammar in zip(samplings, grammars, strict=True):
            sequence = Sequence(
                id=-1,
                token_ids=list(ready.token_ids),  # it grows by the answer
                params=params,
                positions=ready.positions,
                position_offset=ready.position_offset,
                max_tokens=min(params.max_tokens or room, room),
                images=ready.images,
                whole=ready.whole,
                priority=priority,
            )
            core.scheduler.fit(sequence)
            ends = () if params.ignore_eos else self.model.eos_token_ids
            end_ids = frozenset((*ends, *params.stop_token_ids))
            request = Request(
                sequence,
                SamplingState(params, ready.token_ids, end_ids, grammar),
                self.prompts.detokenizer(params.stop, shown),
                end_ids,
                arrived,
                timeout,
            )
            request.begin()
            requests.append(request)
        return requests

    def submit(self, request: Request, deliver: Callable[[RequestOutput], None]) -> int:
        """Queue a prepared request and return its id, see EngineLoop.submit."""
        self._opened()
        return self._loop.submit(request, deliver)

    def check_room(self) -> None:
        """Raises what `submit` would raise now, before anything is put into preparing a request."""
        self._opened()
        self._loop.check_room()

    def cancel(self, id: int) -> None:
        """End a request at the next step, with what it has; finished ids are ignored."""
        self._loop.cancel(id)

    def stats(self) -> EngineStats:
        return self._loop.stats()

    def generate(self, sampling: SamplingParams | None = None, **request: Any) -> Completion:
        """Answer one request; blocks until it is finished.

        request: the fields of Prompt, and unless `sampling` is given those of SamplingParams.
        Raises InputError for anything that cannot be served, OverloadedError, ClosedError, and
        ComputeError for a request that the model fails on.
        """
        (completion,) = self.generate_many([{"sampling": sampling, **request}])
        return completion

    def generate_many(self, requests: Items[Mapping[str, Any]]) -> list[Completion]:
        """Answer requests (each the arguments of generate) together, in their order."""
        together = self.options.max_sequences
        ready = [self._prepare(dict(request)) for request in requests[:together]]
        waiting: deque[tuple[int, Future[Completion]]] = deque()
        done: list[Completion] = []
        try:
            # The first ones are ready together, so that they are computed together; of the others
            # no more are prepared than needed, since their images take memory.
            waiting.extend(self._submit(request) for request in ready)
            for request in requests[together:]:
                if len(waiting) == 2 * together:
                    done.append(waiting.popleft()[1].result())
                waiting.append(self._submit(self._prepare(dict(request))))
            while waiting:
                done.append(waiting[0][1].result())
                waiting.popleft()
        finally:
            for id, _ in waiting:
                self.cancel(id)
        return done

    def stream(self, sampling: SamplingParams | None = None, **request: Any) -> TextStream:
        """Answer one request piece by piece, for arguments and errors see generate."""
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        prepared = self._prepare({"sampling": sampling, **request})
        return TextStream(self, self.submit(prepared, outputs.put), outputs)

    def clear_caches(self) -> None:
        """Forget cached prefixes and image features, as a benchmark wants between requests."""
        self._loop.call(EngineCore.clear_caches)

    def graph_seconds(self) -> tuple[float, float]:
        """time.perf_counter between two steps, and how long the decoder ran so far."""
        return self._loop.call(lambda core: (time.perf_counter(), core.runner.graph_seconds))

    def check_integrity(self) -> None:
        """See EngineCore.check_integrity; between two steps."""
        self._loop.call(EngineCore.check_integrity)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no further requests and wait `timeout` seconds; whether all have finished."""
        return self._loop.drain(timeout)

    def close(self) -> None:
        """Release sessions and caches; running requests end with a ClosedError."""
        if self._core is not None:
            self._core = None
            self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wake(self) -> None:
        self._loop.wake()

    def _opened(self) -> EngineCore:
        if self._core is None:
            raise ClosedError(f"{self.path}: the engine is closed; load it again")
        return self._core

    def _probe(self) -> Request:
        """The smallest request there is."""
        return self.prepare(Prompt(token_ids=[0]), SamplingParams(max_tokens=1))

    def _prepare(self, request: dict[str, Any]) -> Request:
        """A request from the arguments of `generate`."""
        sampling = request.pop("sampling", None)
        prompt = Prompt(**{name: request.pop(name) for name in _PROMPT_FIELDS if name in request})
        if sampling is not None and request:
            raise InputError(f"sampling is given, and the option {next(iter(request))!r}, too")
        return self.prepare(prompt, sampling or SamplingParams.from_options(request))

    def _submit(self, request: Request) -> tuple[int, Future[Completion]]:
        """Queue a request of which the end alone is wanted."""
        future: Future[Completion] = Future()

        def deliver(output: RequestOutput) -> None:
            if output.error is not None:
                future.set_exception(output.error)
            elif output.completion is not None:
                future.set_result(output.completion)

        return self.submit(request, deliver), future


class TextStream(Iterator[str]):
    """The pieces of one answer's text; `completion` is there when they end.

    Closing it, or dropping it, cancels what is left.
    """

    def __init__(self, engine: Engine, id: int, outputs: queue.SimpleQueue[RequestOutput]) -> None:
        self.id = id
        self.completion: Completion | None = None
        self._engine = engine
        self._outputs = outputs
        self._open = True

    def __next__(self) -> str:
        while self._open:
            if text := self.wait().text:
                return text
        raise StopIteration

    def wait(self) -> RequestOutput:
        """The next output, with text or without; there is none after the completion."""
        output = self._outputs.get()
        self._open = not output.finished
        self.completion = output.completion
        if output.error is not None:
            raise output.error
        return output

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
