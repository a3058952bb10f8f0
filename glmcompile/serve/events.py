"""Server-sent events: a streamed answer's bytes, and errors that come after its beginning."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glmcompile.serve.errors import as_api_error
from glmcompile.serve.exchange import Exchange

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
            scope["state"]["error"] = error
            told = as_api_error(error, scope["state"]["request_id"])
            await send({"type": "http.response.body", "body": data(told.body), "more_body": True})
        finally:
            await self._events.aclose()
            self._exchange.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(value: Any) -> bytes:
    """One message without a name, of JSON."""
    return b"data: " + to_json(value) + b"\n\n"


class ChunkWriter:
    """Chunks of one answer in OpenAI's form; all that they share is serialised once."""

    def __init__(self, shared: dict[str, Any]) -> None:
        """shared: the fields before `choices`."""
        self._before = b"data: " + to_json(shared)[:-1] + b',"choices":['

    def choice(self, choice: dict[str, Any], usage: dict[str, int] | None = None) -> bytes:
        """A chunk with one choice."""
        if usage is None:
            return self._before + to_json(choice) + b"]}\n\n"
        return self._before + to_json(choice) + b'],"usage":' + to_json(usage) + b"}\n\n"

    def usage(self, usage: Any) -> bytes:
        """The chunk with the token counts, which has no choices."""
        return self._before + b'],"usage":' + to_json(usage) + b"}\n\n"
