"""A request's life as its caller sees it: streamed outputs, the completion, usage and timings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

from glmcompile.runtime.detokenizer import Detokenizer
from glmcompile.runtime.sampler import Sampled, SamplingState
from glmcompile.runtime.sequence import Sequence


@dataclass(frozen=True)
class Usage:
    """Token counts.

    cached_tokens: prompt tokens found in the prefix cache; image_tokens: prompt tokens of images.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds.

    preprocess: in Engine.prepare: images, chat template, tokenizer.
    queue: from there to the step that admits the request.
    vision: in the vision encoder, a part of prefill.
    prefill: from that step to the first token.
    ttft: time to first token: preprocess, queue and prefill.
    per_token: mean time from one token to the next after the first; 0 for a single token (TPOT).
    total: from the call of Engine.prepare to the last token.
    inter_token: from one token to the next; 0 between tokens that one step gave.
    """

    preprocess: float
    queue: float
    vision: float
    prefill: float
    ttft: float
    per_token: float
    total: float
    inter_token: tuple[float, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    token_ids: every chosen token, an end-of-sequence token included.
    finish_reason: "stop" (end of sequence, a stop string or a grammar's end), "length" or
        "cancelled".
    stop_reason: the stop string or the token of SamplingParams.stop_token_ids that ended it.
    logprobs: one entry per token where SamplingParams.logprobs asked for them, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[Sampled, ...] = ()
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What one step gave one request.

    text: what can be shown since the last output, often "" (part of a character, of a stop string).
    token_ids: tokens chosen since the last output.
    logprobs: of those tokens, where SamplingParams.logprobs asked for them.
    completion: the whole answer, with the last output.
    error: what went wrong while computing; it is the last output, without a completion.
    """

    id: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Sampled, ...] = ()
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return self.completion is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """The engine's record of a request.

    end_ids: tokens that end the answer. arrived, queued: seconds of time.perf_counter. timeout:
    seconds from `arrived` after which the request ends with a DeadlineError.
    """

    sequence: Sequence
    sampling: SamplingState
    detokenizer: Detokenizer
    end_ids: frozenset[int]
    arrived: float
    timeout: float | None = None
    queued: float = field(default_factory=time.perf_counter)
    started: float | None = None
    token_times: list[float] = field(default_factory=list)
    vision: float = 0.0
    logprobs: list[Sampled] = field(default_factory=list)
    stop_reason: str | int | None = None
    _unseen_text: str = ""

    def is_late(self, now: float) -> bool:
        return self.timeout is not None and now - self.arrived > self.timeout

    def begin(self) -> None:
        """Append what a grammar forces before the first token is chosen; one is left to choose.

        Stop strings are looked for from the first chosen token on, so with any nothing is appended.
        """
        if self.sequence.params.stop:
            return
        for token in self.sampling.forced()[: self.sequence.max_tokens - 1]:
            self._unseen_text += self._append(token)[0]

    def accept(self, sampled: Sampled) -> tuple[RequestOutput, str | None]:
        """Append a token, and those that a grammar forces after it.

        Returns what to show, without a completion, and when the answer ends here, why.
        """
        sequence = self.sequence
        logprobs = () if sequence.params.logprobs is None else (sampled,)
        text, reason = self._append(sampled.token)
        while reason is None and (forced := self.sampling.forced()):
            for token in forced:
                more, reason = self._append(token)
                text += more
                if reason is not None:
                    break
        self.logprobs += logprobs
        text, self._unseen_text = self._unseen_text + text, ""
        tokens = tuple(sequence.answer_ids[len(self.token_times) :])
        self.token_times += [time.perf_counter()] * len(tokens)
        return RequestOutput(sequence.id, text, tokens, logprobs), reason

    def completion(self, reason: str) -> Completion:
        now = time.perf_counter()
        sequence, times = self.sequence, self.token_times or [now]
        started = self.started if self.started is not None else now
        first, last = times[0], times[-1]
        return Completion(
            text=self.detokenizer.text,
            token_ids=tuple(sequence.answer_ids),
            finish_reason=reason,
            usage=Usage(
                sequence.num_prompt_tokens,
                sequence.num_answer_tokens,
                sequence.num_cached_tokens or 0,
                sum(span.num_tokens for span in sequence.images),
            ),
            timings=Timings(
                preprocess=self.queued - self.arrived,
                queue=started - self.queued,
                vision=self.vision,
                prefill=first - started,
                ttft=first - self.arrived,
                per_token=(last - first) / (len(times) - 1) if len(times) > 1 else 0.0,
                total=last - self.arrived,
                inter_token=tuple(after - before for before, after in pairwise(times)),
            ),
            logprobs=tuple(self.logprobs),
            stop_reason=self.stop_reason,
        )

    def _append(self, token: int) -> tuple[str, str | None]:
        """One more token of the answer; returns its text, and the reason when it is the last."""
        sequence, detokenizer = self.sequence, self.detokenizer
        self.sampling.accept(token)
        sequence.token_ids.append(token)
        if token in self.end_ids:
            if token in sequence.params.stop_token_ids:
                self.stop_reason = token
            return detokenizer.finish(), "stop"
        text = detokenizer.add(token)
        ended = self.sampling.finished
        last = ended or sequence.num_answer_tokens >= sequence.max_tokens
        if last:
            text += detokenizer.finish()
        if detokenizer.stopped_by is not None:
            self.stop_reason = detokenizer.stopped_by
            return text, "stop"
        return text, ("stop" if ended else "length") if last else None
