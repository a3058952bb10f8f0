"""Plain completions: from the engine's outputs to one JSON answer or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from glmcompile.runtime.request import Completion, RequestOutput
from glmcompile.runtime.sampler import Sampled
from glmcompile.serve.events import chunks
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.common import token_usage
from glmcompile.serve.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TextCompletion,
)
from glmcompile.serve.tokens import TokenTexts, shown_logprob


class TextAnswer:
    """How the answers to one request for completions are written."""

    def __init__(
        self, body: CompletionRequest, id: str, created: int, model: str, texts: TokenTexts
    ) -> None:
        """texts: of the engine's vocabulary."""
        self._body = body
        self._shared: dict[str, Any] = {"id": id, "created": created, "model": model}
        self._writers = [
            _ChoiceWriter(
                place * body.n + number,
                _text(prompt, texts) if body.echo else "",
                texts,
                body.logprobs is not None,
            )
            for place, prompt in enumerate(body.each_prompt)
            for number in range(body.n)
        ]

    def whole(self, completions: Sequence[Completion]) -> TextCompletion:
        """completions: prompt by prompt, n of each."""
        return TextCompletion(
            **self._shared,
            choices=[
                writer.choice(done.text, done.logprobs, done)
                for writer, done in zip(self._writers, completions, strict=True)
            ],
            usage=token_usage([done.usage for done in completions], self._body.n),
        )

    def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Chunks as the answers grow, the prompt's text before the first where it is wanted."""
        shared = {**self._shared, "object": "text_completion"}
        return chunks(exchange, shared, self._writers, self._body.stream_options, self._body.n)


class _ChoiceWriter:
    """One answer's pieces; holds tokens' log-probabilities until there is text to show."""

    def __init__(self, index: int, echo: str, texts: TokenTexts, logprobs: bool) -> None:
        self._index, self._texts = index, texts
        self._echo = echo  # until it is shown
        self._offset = len(echo)
        self._wants_logprobs = logprobs
        self._logprobs: list[Sampled] = []

    def next(self, output: RequestOutput) -> dict[str, Any] | None:
        self._logprobs += output.logprobs
        if not output.text and output.completion is None:
            return None
        held, self._logprobs = self._logprobs, []
        return self.choice(output.text, held, output.completion).model_dump()

    def choice(
        self, text: str, logprobs: Sequence[Sampled], done: Completion | None
    ) -> CompletionChoice:
        echo, self._echo = self._echo, ""
        choice = CompletionChoice(
            index=self._index,
            text=echo + text,
            logprobs=self._written(logprobs) if self._wants_logprobs else None,
            finish_reason=done.finish_reason if done is not None else None,
            stop_reason=done.stop_reason if done is not None else None,
        )
        self._offset += len(text)
        return choice

    def _written(self, tokens: Sequence[Sampled]) -> CompletionLogprobs:
        names = [self._texts.text(each.token) for each in tokens]
        offsets, place = [], self._offset
        for name in names:
            offsets.append(place)
            place += len(name)
        return CompletionLogprobs(
            tokens=names,
            token_logprobs=[shown_logprob(each.logprob) for each in tokens],
            top_logprobs=[
                {self._texts.text(id): shown_logprob(value) for id, value in each.top_logprobs}
                for each in tokens
            ],
            text_offset=offsets,
        )


def _text(prompt: str | list[int], texts: TokenTexts) -> str:
    return prompt if isinstance(prompt, str) else texts.decode(prompt)
