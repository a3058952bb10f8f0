"""Which chunks count as tokens' arrivals, and which streams are no answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Any

import pytest

from glmcompile.bench.load import answer as module
from glmcompile.bench.load.answer import Answer, RequestError, error_message, read_answer

USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}


def chunk(delta: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def read(*pieces: bytes) -> Answer:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return asyncio.run(read_answer(stream()))


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece comes at 1 s, the second at 2 s, and so on."""
    seconds = count(1)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))


def test_arrivals_are_of_chunks_with_choices() -> None:
    answer = read(
        event({"choices": [], "usage": None}),  # 1: as Azure sends first
        event(chunk({"role": "assistant", "content": ""})),  # 2
        event(chunk({"content": "a"})),  # 3
        event(chunk({"content": ""})),  # 4: a token of half a character
        event(chunk({"reasoning_content": "b"})) + event(chunk({"content": "c"})),  # 5: two
        event(chunk({}, "stop")),  # 6: no token
        event(USAGE),
        event("[DONE]"),
    )
    assert answer.arrivals == (2, 3, 4, 5, 5)
    assert answer.ended == 6
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (11, 4, 3)


def test_a_last_chunk_with_text_is_an_arrival() -> None:
    answer = read(event(chunk({"content": "a"})), event(chunk({"content": "b"}, "stop") | USAGE_OF))
    assert answer.arrivals == (1, 2)


USAGE_OF = {"usage": USAGE["usage"]}


@pytest.mark.parametrize(
    ("pieces", "kind", "words"),
    [
        ([], "malformed", "finish_reason"),
        ([event(chunk({"content": "a"})), event(USAGE), event("[DONE]")], "malformed", "ended"),
        ([event(chunk({"content": "a"}, "stop")), event("[DONE]")], "malformed", "usage"),
        ([event("{")], "malformed", "not JSON"),
        ([event("[]")], "malformed", "object"),
        ([event({"choices": [{"delta": "a"}]})], "malformed", "chunk"),
        ([event({"choices": {"a": 1}})], "malformed", "chunk"),
        ([event({"error": {"message": "out of memory"}})], "error in stream", "out of memory"),
    ],
)
def test_what_is_no_answer_says_why(pieces: Sequence[bytes], kind: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        read(*pieces)
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "too long", "type": "x"}}',
        '{"message": "too long", "object": "error"}',
        '{"detail": "too long"}',
        '"too long"',
        "too\nlong",
    ],
)
def test_error_messages_of_different_servers(body: str) -> None:
    assert error_message(body) == "too long"
