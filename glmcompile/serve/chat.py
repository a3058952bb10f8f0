"""Chat completions: from the engine's outputs to one JSON answer or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from glmcompile.runtime.request import Completion, RequestOutput
from glmcompile.runtime.sampler import Sampled
from glmcompile.serve.events import chunks
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
from glmcompile.serve.tokens import TokenTexts, shown_logprob


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

    def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Chunks as the answers grow; the role comes with the first text of each.

        A load generator takes the first chunk with a choice for the first token.
        """
        shared = {**self._shared, "object": "chat.completion.chunk"}
        writers = [
            _ChunkWriter(index, self._texts, self._body.logprobs) for index in range(self._body.n)
        ]
        return chunks(exchange, shared, writers, self._body.stream_options, self._body.n)

    def _choice(self, index: int, done: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content=done.text),
            logprobs=token_logprobs(done.logprobs, self._texts) if self._body.logprobs else None,
            finish_reason=done.finish_reason,
            stop_reason=done.stop_reason,
        )


class _ChunkWriter:
    """One answer's pieces; holds tokens' log-probabilities until there is text to show."""

    def __init__(self, index: int, texts: TokenTexts, logprobs: bool) -> None:
        self._index, self._texts = index, texts
        self._logprobs: list[Sampled] | None = [] if logprobs else None
        self._begun = False

    def next(self, output: RequestOutput) -> dict[str, Any] | None:
        """The choice of the next chunk, where the output has something for one."""
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
            "index": self._index,
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

    def named(id: int, logprob: float | None) -> dict[str, Any]:
        bytes = texts.bytes(id)
        return {"token": texts.text(id), "logprob": shown_logprob(logprob), "bytes": list(bytes)}

    return ChoiceLogprobs(
        content=[
            TokenLogprob(
                **named(each.token, each.logprob),
                top_logprobs=[TopLogprob(**named(*top)) for top in each.top_logprobs],
            )
            for each in tokens
        ]
    )
