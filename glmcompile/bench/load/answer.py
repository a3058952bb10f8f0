"""One answer as a client sees it: when its pieces came, and how many tokens it was."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from glmcompile.bench.load.sse import EventDecoder


class RequestError(Exception):
    """A request that was not answered as it should be.

    kind: what it is counted under: "HTTP 429", "time-out", "connection", "malformed",
    "error in stream". status: of HTTP, if there was one. retry_after: seconds the server asked for.
    """

    def __init__(
        self, kind: str, message: str, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """Times are those of time.perf_counter, in seconds.

    arrivals: of the first chunk with choices, and of each later one that brought something; tokens
    that came in one chunk have one arrival. ended: of the last chunk with choices. Tokens as the
    server counts them.
    """

    arrivals: tuple[float, ...]
    ended: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


async def read_answer(pieces: AsyncIterator[bytes]) -> Answer:
    """Read a streamed chat completion, whose body comes in `pieces` as the network cut them.

    Raises RequestError ("malformed", "error in stream").
    """
    decoder = EventDecoder()
    arrivals: list[float] = []
    ended, usage, complete = 0.0, None, False
    async for piece in pieces:
        now = time.perf_counter()
        for event in decoder.feed(piece):
            if event == "[DONE]":
                continue
            chunk = _parse(event)
            choices = chunk.get("choices")
            if choices:
                brought, closing = _look(choices, event)
                if brought or not arrivals:
                    arrivals.append(now)
                ended = now
                complete = complete or closing
            usage = chunk.get("usage") or usage
    if not complete:
        raise RequestError("malformed", "the stream ended before a chunk with a finish_reason")
    return Answer(tuple(arrivals), ended, *count_tokens(usage))


def count_tokens(usage: Any) -> tuple[int, int, int]:
    """Prompt, cached and output tokens of a `usage`; RequestError ("malformed") without one."""
    try:
        details = usage.get("prompt_tokens_details") or {}
        cached = int(details.get("cached_tokens") or 0)
        return int(usage["prompt_tokens"]), cached, int(usage["completion_tokens"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError("malformed", f"no token counts in `usage`: {usage!r}") from error


def error_message(body: str) -> str:
    """What an error's body says, of at most 300 characters: OpenAI's shape, others', or as it is.

    vLLM once had `message` at the top, FastAPI has `detail`.
    """
    try:
        found: Any = json.loads(body)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
    except ValueError:
        found = body
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:300]


def _parse(event: str) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except ValueError as error:
        raise RequestError("malformed", f"an event is not JSON: {event[:100]!r}") from error
    if not isinstance(chunk, dict):
        raise RequestError("malformed", f"an event is not a JSON object: {event[:100]!r}")
    if chunk.get("error"):
        raise RequestError("error in stream", error_message(event))
    return chunk


def _look(choices: Any, event: str) -> tuple[bool, bool]:
    """Whether a chunk brought text or alike, and whether it ended the answer.

    A chunk in the middle counts even if its text is empty, as that of half a character is; the
    last one of many servers has a finish_reason alone.
    """
    try:
        delta, closing = choices[0].get("delta") or {}, bool(choices[0].get("finish_reason"))
        brought = any(value for name, value in delta.items() if name != "role")
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise RequestError(
            "malformed", f"not a chat completion's chunk: {event[:100]!r}"
        ) from error
    return brought or not closing, closing
