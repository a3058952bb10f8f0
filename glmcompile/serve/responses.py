"""Responses: from the engine's outputs to one JSON answer or a stream of typed events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from glmcompile.runtime.request import Completion
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.answer_form import AnswerForm
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.responses import (
    IncompleteDetails,
    ModelResponse,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    ResponsesRequest,
    ResponseUsage,
)
from glmcompile.serve.tokens import TokenTexts
from glmcompile.serve.tool_formats import ToolCall


@dataclass
class _OpenText:
    """An item whose text still grows. kind: how its events are called."""

    kind: str
    id: str
    place: int
    text: str = ""

    def part(self, text: str) -> OutputText | ReasoningText:
        return OutputText(text=text) if self.kind == "output_text" else ReasoningText(text=text)

    def item(self, status: str, *, begun: bool = False) -> OutputItem:
        """begun: without what it holds."""
        content: Any = [] if begun else [self.part(self.text)]
        made = OutputMessage if self.kind == "output_text" else OutputReasoning
        return made(id=self.id, status=status, content=content)


class ResponseWriter:
    """How the answer to one request is written; `whole` or `events`, once."""

    def __init__(
        self,
        body: ResponsesRequest,
        form: AnswerForm,
        params: SamplingParams,
        request_id: str,
        created: int,
        model: str,
        texts: TokenTexts,
    ) -> None:
        self._form, self._texts = form, texts
        self._parser, self._request_id = form.parser(), request_id
        self._num_events = 0
        self._items: list[OutputItem] = []  # finished ones
        self._open: _OpenText | None = None
        self._begun = ModelResponse(
            id=f"resp_{request_id}",
            created_at=created,
            model=model,
            status="in_progress",
            output=[],
            instructions=body.instructions,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls,
            temperature=params.temperature,
            top_p=params.top_p,
            max_output_tokens=body.max_output_tokens,
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
        )

    def whole(self, done: Completion) -> ModelResponse:
        """The answer of a finished request."""
        for _ in self._grow(done.text, done):
            pass
        return self._finished(done)

    async def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Events as the answer grows, in the order that OpenAI's client expects them."""
        async for item in exchange.outputs():
            output = item.output
            if output.error is not None:
                raise output.error
            if not self._num_events:
                yield self._event("created", response=self._begun)
                yield self._event("in_progress", response=self._begun)
            for event in self._grow(output.text, output.completion):
                yield event
            if output.completion is not None:
                response = self._finished(output.completion)
                yield self._event(response.status, response=response)

    def _grow(self, text: str, done: Completion | None) -> Iterator[bytes]:
        """The events of a piece of text, and of the answer's end with the last one."""
        parts = self._parser.add(text, last=done is not None)
        if parts.reasoning:
            yield from self._more("reasoning_text", "rs", parts.reasoning)
        if parts.content:
            yield from self._more("output_text", "msg", parts.content)
        for call in parts.calls:
            yield from self._call(call)
        if done is not None:
            if self._open is None and not self._items:  # an answer without a word
                yield from self._more("output_text", "msg", "")
            yield from self._end(_status(done))

    def _more(self, kind: str, prefix: str, text: str) -> Iterator[bytes]:
        """The events of text, which begins an item of its kind where none is open."""
        if self._open is None or self._open.kind != kind:
            yield from self._end("completed")
            place = len(self._items)
            self._open = _OpenText(kind, f"{prefix}_{self._request_id}_{place}", place)
            item = self._open.item("in_progress", begun=True)
            yield self._event("output_item.added", output_index=place, item=item)
            yield self._in_open("content_part.added", part=self._open.part(""))
        self._open.text += text
        if text:
            yield self._in_open(f"{kind}.delta", delta=text, **_logprobs(kind))

    def _end(self, status: str) -> Iterator[bytes]:
        """The events that end the open item, if there is one."""
        ended = self._open
        if ended is None:
            return
        yield self._in_open(f"{ended.kind}.done", text=ended.text, **_logprobs(ended.kind))
        yield self._in_open("content_part.done", part=ended.part(ended.text))
        self._items.append(ended.item(status))
        self._open = None
        yield self._event("output_item.done", output_index=ended.place, item=self._items[-1])

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        """The events of a call, which ends what is open."""
        yield from self._end("completed")
        place = len(self._items)
        item = OutputCall(
            id=f"fc_{self._request_id}_{place}",
            call_id=call.id,
            name=call.name,
            arguments=call.arguments,
            status="completed",
        )
        begun = item.model_copy(update={"arguments": "", "status": "in_progress"})
        where = {"output_index": place, "item_id": item.id}
        yield self._event("output_item.added", output_index=place, item=begun)
        yield self._event("function_call_arguments.delta", **where, delta=call.arguments)
        yield self._event(
            "function_call_arguments.done", **where, name=call.name, arguments=call.arguments
        )
        self._items.append(item)
        yield self._event("output_item.done", output_index=place, item=item)

    def _finished(self, done: Completion) -> ModelResponse:
        cut = IncompleteDetails(reason="max_output_tokens")
        return self._begun.model_copy(
            update={
                "status": _status(done),
                "output": self._items,
                "usage": ResponseUsage.of(
                    done.usage, self._form.reasoning_tokens(done.token_ids, self._texts)
                ),
                "incomplete_details": cut if done.finish_reason == "length" else None,
            }
        )

    def _in_open(self, name: str, /, **fields: Any) -> bytes:
        assert self._open is not None
        where = {"output_index": self._open.place, "content_index": 0, "item_id": self._open.id}
        return self._event(name, **where, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        event = {"type": f"response.{name}", "sequence_number": number, **fields}
        return f"event: response.{name}\ndata: ".encode() + to_json(event) + b"\n\n"


def _logprobs(kind: str) -> dict[str, list[Any]]:
    """OpenAI's client expects the field on text, and not on reasoning."""
    return {"logprobs": []} if kind == "output_text" else {}


def _status(done: Completion) -> str:
    return "incomplete" if done.finish_reason == "length" else "completed"
