"""Chat completions: from the engine's outputs to one JSON answer or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from glmcompile.runtime.request import Completion, RequestOutput
from glmcompile.runtime.sampler import Sampled
from glmcompile.serve.answer_form import AnswerForm, AnswerParts
from glmcompile.serve.events import chunks
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.chat import (
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    ChoiceLogprobs,
    MessageToolCall,
    TokenLogprob,
    TopLogprob,
)
from glmcompile.serve.protocol.common import token_usage
from glmcompile.serve.tokens import TokenTexts, shown_logprob
from glmcompile.serve.tool_formats import ToolCall


class ChatAnswer:
    """How the answers to one chat request are written."""

    def __init__(
        self,
        body: ChatRequest,
        form: AnswerForm,
        id: str,
        created: int,
        model: str,
        texts: TokenTexts,
    ) -> None:
        """form: of the answers. texts: of the engine's vocabulary."""
        self._body, self._form, self._texts = body, form, texts
        self._shared: dict[str, Any] = {"id": id, "created": created, "model": model}

    def whole(self, completions: Sequence[Completion]) -> ChatCompletion:
        """completions: the answers in their order."""
        return ChatCompletion(
            **self._shared,
            choices=[self._choice(index, done) for index, done in enumerate(completions)],
            usage=token_usage(
                [done.usage for done in completions],
                self._body.n,
                sum(self._count_reasoning(done.token_ids) for done in completions),
            ),
        )

    def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Chunks as the answers grow; the role comes with the first text of each.

        A load generator takes the first chunk with a choice for the first token.
        """
        shared = {**self._shared, "object": "chat.completion.chunk"}
        writers = [
            _ChunkWriter(index, self._form, self._texts, self._body.logprobs)
            for index in range(self._body.n)
        ]
        options, n = self._body.stream_options, self._body.n
        return chunks(exchange, shared, writers, options, n, self._count_reasoning)

    def _count_reasoning(self, token_ids: Sequence[int]) -> int:
        return self._form.reasoning_tokens(token_ids, self._texts)

    def _choice(self, index: int, done: Completion) -> ChatChoice:
        parts = self._form.split(done.text)
        calls = [_call(call) for call in parts.calls]
        return ChatChoice(
            index=index,
            message=ChatMessage(
                content=parts.content if parts.content or not calls else None,
                reasoning_content=parts.reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=token_logprobs(done.logprobs, self._texts) if self._body.logprobs else None,
            finish_reason=_reason(done, bool(calls)),
            stop_reason=done.stop_reason,
        )


class _ChunkWriter:
    """One answer's pieces; holds tokens' log-probabilities until there is something to show."""

    def __init__(self, index: int, form: AnswerForm, texts: TokenTexts, logprobs: bool) -> None:
        self._index, self._texts = index, texts
        self._parser = form.parser()
        self._logprobs: list[Sampled] | None = [] if logprobs else None
        self._begun = False
        self._num_calls = 0

    def next(self, output: RequestOutput) -> dict[str, Any] | None:
        if self._logprobs is not None:
            self._logprobs += output.logprobs
        done = output.completion
        parts = self._parser.add(output.text, last=done is not None)
        if not parts and done is None:
            return None
        choice: dict[str, Any] = {
            "index": self._index,
            "delta": self._delta(parts),
            "logprobs": None,
            "finish_reason": None,
        }
        if done is not None:
            choice["finish_reason"] = _reason(done, bool(self._num_calls))
            choice["stop_reason"] = done.stop_reason
        if self._logprobs:
            choice["logprobs"] = token_logprobs(self._logprobs, self._texts)
            self._logprobs = []
        return choice

    def _delta(self, parts: AnswerParts) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if not self._begun:
            self._begun = True
            delta = {"role": "assistant", "content": ""}
        if parts.content:
            delta["content"] = parts.content
        if parts.reasoning:
            delta["reasoning_content"] = parts.reasoning
        if parts.calls:
            delta["tool_calls"] = [
                {"index": place, **_call(call).model_dump()}
                for place, call in enumerate(parts.calls, self._num_calls)
            ]
            self._num_calls += len(parts.calls)
        return delta


def _call(call: ToolCall) -> MessageToolCall:
    return MessageToolCall(
        id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)
    )


def _reason(done: Completion, has_calls: bool) -> str:
    return "tool_calls" if has_calls and done.finish_reason == "stop" else done.finish_reason


def token_logprobs(tokens: Sequence[Sampled], texts: TokenTexts) -> ChoiceLogprobs:
    """Chosen tokens in OpenAI's form, each with the most likely ones."""

    def named(id: int, logprob: float | None) -> dict[str, Any]:
        bytes = texts.encoded(id)
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
