"""Responses: from the engine's outputs to one JSON answer or a stream of typed events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json

from glmcompile.runtime.request import Completion
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.responses import (
    IncompleteDetails,
    ModelResponse,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponseUsage,
)


class ResponseWriter:
    """How the answer to one request is written; `whole` or `events`, once."""

    def __init__(
        self,
        body: ResponsesRequest,
        params: SamplingParams,
        request_id: str,
        created: int,
        model: str,
    ) -> None:
        self._message_id = f"msg_{request_id}"
        self._sequence_number = 0
        self._begun = ModelResponse(
            id=f"resp_{request_id}",
            created_at=created,
            model=model,
            status="in_progress",
            output=[],
            instructions=body.instructions,
            metadata=body.metadata or {},
            temperature=params.temperature,
            top_p=params.top_p,
            max_output_tokens=body.max_output_tokens,
        )

    def whole(self, done: Completion) -> ModelResponse:
        cut = done.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        return self._begun.model_copy(
            update={
                "status": status,
                "output": [self._message(status, [OutputText(text=done.text)])],
                "usage": ResponseUsage.of(done.usage),
                "incomplete_details": IncompleteDetails(reason="max_output_tokens")
                if cut
                else None,
            }
        )

    async def events(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Events as the answer grows, in the order that OpenAI's client expects them."""
        place: dict[str, Any] = {"output_index": 0, "content_index": 0, "item_id": self._message_id}
        text, begun = "", False
        async for item in exchange.outputs():
            output = item.output
            if output.error is not None:
                raise output.error
            if not begun:
                begun = True
                yield self._event("created", response=self._begun)
                yield self._event("in_progress", response=self._begun)
                message = self._message("in_progress", [])
                yield self._event("output_item.added", output_index=0, item=message)
                yield self._event("content_part.added", **place, part=OutputText(text=""))
            if output.text:
                text += output.text
                yield self._event("output_text.delta", **place, delta=output.text, logprobs=[])
            if output.completion is not None:
                whole = self.whole(output.completion)
                yield self._event("output_text.done", **place, text=text, logprobs=[])
                yield self._event("content_part.done", **place, part=whole.output[0].content[0])
                yield self._event("output_item.done", output_index=0, item=whole.output[0])
                yield self._event(whole.status, response=whole)

    def _message(self, status: str, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=content)

    def _event(self, name: str, **fields: Any) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        event = {"type": f"response.{name}", "sequence_number": number, **fields}
        return f"event: response.{name}\ndata: ".encode() + to_json(event) + b"\n\n"
