"""Chat completions: from the engine's outputs to one JSON answer or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from glmcompile.runtime.request import Completion, RequestOutput
from glmcompile.runtime.sampler import Sampled
from glmcompile.serve.events import DONE, ChunkWriter
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    ChoiceLogprobs,
    TokenLogprob,
    TopLogprob,
)
from glmcompile.serve.protocol.common import token_usage
from glmcompile.serve.tokens import TokenTexts

# JSON has no infinity; OpenAI writes this for tokens that cannot be.
_LEAST_LOGPROB = -9999.0


class ChatAnswer:
    """How the answers to one chat request are written."""

    def __init__(self, body: ChatRequest, id: str, created: int, model: str, texts: TokenTexts):
        """texts: of the engine's vocabulary."""
        self._body, self._texts = body, texts
        self._shared = {"id": id, "created": created, "model": model}

    def whole(self, completions: Sequence[Completion]) -> ChatCompletion:
        """completions: the answers in their order."""
        return ChatCompletion(
            **self._shared,
            choices=[self._choice(index, done) for index, done in enumerate(completions)],
            usage=token_usage([done.usage for done in completions], self._body.n),
        )

    async def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Chunks as the answers grow; the role comes with the first text of each.

        A load generator takes the first chunk with a choice for the first token.
        """
        options = self._body.stream_options
        continuous = options is not None and options.continuous_usage_stats
        chunks = ChunkWriter({**self._shared, "object": "chat.completion.chunk"})
        choices = [_ChoiceWriter(self._texts, self._body.logprobs) for _ in range(self._body.n)]
        async for item in exchange.outputs():
            output, writer = item.output, choices[item.index]
            if output.error is not None:
                raise output.error
            if (choice := writer.next(item.index, output)) is not None:
                counts = None
                if continuous:
                    tokens = sum(each.num_tokens for each in choices)
                    counts = _counts(exchange.prompt_tokens, tokens)
                yield chunks.choice(choice, counts)
        if options is not None and options.include_usage and exchange.finished:
            yield chunks.usage(token_usage(exchange.usages, self._body.n))
        yield DONE

    def _choice(self, index: int, done: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content=done.text),
            logprobs=token_logprobs(done.logprobs, self._texts) if self._body.logprobs else None,
            finish_reason=done.finish_reason,
            stop_reason=done.stop_reason,
        )


class _ChoiceWriter:
    """One answer's pieces; holds tokens' log-probabilities until there is text to show."""

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts = texts
        self._logprobs: list[Sampled] | None = [] if logprobs else None
        self._begun = False
        self.num_tokens = 0

    def next(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """The choice of the next chunk, where the output has something for one."""
        self.num_tokens += len(output.token_ids)
        if self._logprobs is not None:
            self._logprobs += output.logprobs
        done = output.completion
        if not output.text and done is None:
            return None
        delta: dict[str, Any] = {}
        if not self._begun:
            self._begun = True
            delta = {"role": "assistant", "content": output.text}
        elif output.text:
            delta = {"content": output.text}
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None if done is None else done.finish_reason,
        }
        if done is not None:
            choice["stop_reason"] = done.stop_reason
        if self._logprobs:
            choice["logprobs"] = token_logprobs(self._logprobs, self._texts)
            self._logprobs = []
        return choice


def token_logprobs(tokens: Sequence[Sampled], texts: TokenTexts) -> ChoiceLogprobs:
    """Chosen tokens in OpenAI's form, each with the most likely ones."""

    def named(id: int, logprob: float) -> dict[str, Any]:
        known = max(logprob, _LEAST_LOGPROB)
        return {"token": texts.text(id), "logprob": known, "bytes": list(texts.bytes(id))}

    return ChoiceLogprobs(
        content=[
            TokenLogprob(
                **named(each.token, each.logprob or 0.0),
                top_logprobs=[TopLogprob(**named(*top)) for top in each.top_logprobs],
            )
            for each in tokens
        ]
    )


def _counts(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
