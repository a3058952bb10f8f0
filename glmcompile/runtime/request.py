"""A request's life as its caller sees it: streamed outputs, the completion, usage and timings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from glmcompile.runtime.detokenizer import Detokenizer
from glmcompile.runtime.sampler import Sampled, SamplingState
from glmcompile.runtime.sequence import Sequence


@dataclass(frozen=True)
class Usage:
    """Token counts. cached_tokens: prompt tokens found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds.

    preprocess: in add_request: images, chat template, tokenizer.
    queue: from there to the first step that computes the request.
    vision: in the vision encoder, a part of prefill.
    prefill: from that first step to the first token.
    ttft: time to first token: preprocess, queue and prefill.
    per_token: mean time from one token to the next after the first; 0 for a single token (TPOT).
    total: from the call of add_request to the last token.
    """

    preprocess: float
    queue: float
    vision: float
    prefill: float
    ttft: float
    per_token: float
    total: float


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    token_ids: every chosen token, an end-of-sequence token included.
    finish_reason: "stop" (end of sequence or a stop string), "length" or "cancelled".
    logprobs: one entry per token where SamplingParams.logprobs asked for them, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[Sampled, ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """What one step gave one request.

    text: what can be shown since the last output, often "" (part of a character, of a stop string).
    token_ids: tokens chosen since the last output.
    completion: the whole answer, with the last output.
    error: what went wrong while computing; it is the last output, without a completion.
    """

    id: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return self.completion is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """The engine's record of a request. end_ids: tokens that end the answer."""

    sequence: Sequence
    sampling: SamplingState
    detokenizer: Detokenizer
    end_ids: frozenset[int]
    arrived: float
    queued: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    vision: float = 0.0
    logprobs: list[Sampled] = field(default_factory=list)

    def accept(self, sampled: Sampled) -> tuple[str, str | None]:
        """Append a token; returns the text to show and, when it is the last, the finish reason."""
        token, sequence = sampled.token, self.sequence
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        sequence.token_ids.append(token)
        self.sampling.accept(token)
        if sequence.params.logprobs is not None:
            self.logprobs.append(sampled)
        if token in self.end_ids:
            return self.detokenizer.finish(), "stop"
        text = self.detokenizer.add(token)
        last = sequence.num_answer_tokens >= sequence.max_tokens
        if last:
            text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            return text, "stop"
        return text, "length" if last else None

    def completion(self, reason: str) -> Completion:
        now = time.perf_counter()
        started = self.started if self.started is not None else now
        first = self.first_token if self.first_token is not None else now
        last = self.last_token if self.last_token is not None else now
        count = self.sequence.num_answer_tokens
        return Completion(
            text=self.detokenizer.text,
            token_ids=tuple(self.sequence.answer_ids),
            finish_reason=reason,
            usage=Usage(
                self.sequence.num_prompt_tokens, count, self.sequence.num_cached_tokens or 0
            ),
            timings=Timings(
                preprocess=self.queued - self.arrived,
                queue=started - self.queued,
                vision=self.vision,
                prefill=first - started,
                ttft=first - self.arrived,
                per_token=(last - first) / (count - 1) if count > 1 else 0.0,
                total=last - self.arrived,
            ),
            logprobs=tuple(self.logprobs),
        )
