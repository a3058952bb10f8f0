"""Server-sent events: a streamed answer's bytes, and errors that come after its beginning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glmcompile.runtime.request import RequestOutput
from glmcompile.serve.errors import as_api_error
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.protocol.common import StreamOptions, token_usage

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come; a reader that is slow holds up nobody but itself.

    Nothing is sent before the first event is there, so that an error until then has its own status.
    One that comes later is an event `{"error": ...}`, after which the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncGenerator[bytes, None]) -> None:
        """exchange: closed when the stream ends. events: whole SSE messages."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._events = exchange, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # As a task of its own: each wait would else pass through every layer around the routes.
        await asyncio.create_task(self._send_events(scope, receive, send))

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for event in self._events:
                if not started:
                    started = True
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not started:
                raise
            told = as_api_error(error, scope["state"]["request_id"])
            await send({"type": "http.response.body", "body": data(told.body), "more_body": True})
        finally:
            await self._events.aclose()
            self._exchange.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(value: Any) -> bytes:
    """One message without a name, of JSON."""
    return b"data: " + to_json(value) + b"\n\n"


class ChoiceWriter(Protocol):
    """Turns one answer's outputs into the choices of its chunks."""

    def next(self, output: RequestOutput) -> dict[str, Any] | None:
        """The next chunk's choice; None while there is nothing to show."""


async def chunks(
    exchange: Exchange,
    shared: dict[str, Any],
    writers: Sequence[ChoiceWriter],
    options: StreamOptions | None,
    per_prompt: int,
    count_reasoning: Callable[[Sequence[int]], int] = lambda token_ids: 0,
) -> AsyncGenerator[bytes, None]:
    """A streamed answer in OpenAI's form: chunks with a choice each, counts last, and `[DONE]`.

    shared: what all chunks begin with, serialised once. per_prompt: answers of each prompt.
    count_reasoning: how many of an answer's tokens are thinking.
    """
    options = options or StreamOptions()
    begin = b"data: " + to_json(shared)[:-1] + b',"choices":['
    completion_tokens = 0
    async for item in exchange.outputs():
        if item.output.error is not None:
            raise item.output.error
        completion_tokens += len(item.output.token_ids)
        choice = writers[item.answer].next(item.output)
        if choice is None:
            continue
        if options.continuous_usage_stats:
            counts = {
                "prompt_tokens": exchange.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": exchange.prompt_tokens + completion_tokens,
            }
            yield begin + to_json(choice) + b'],"usage":' + to_json(counts) + b"}\n\n"
        else:
            yield begin + to_json(choice) + b"]}\n\n"
    if options.include_usage and exchange.finished:
        reasoning = sum(count_reasoning(done.token_ids) for done in exchange.answers)
        usage = token_usage([done.usage for done in exchange.answers], per_prompt, reasoning)
        yield begin + b'],"usage":' + to_json(usage) + b"}\n\n"
    yield DONE
