"""A small server that answers as it is told, to test what a load generator makes of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "scripted"
TOKENS_PER_WORD = 2


@dataclass(frozen=True)
class Script:
    """How one streamed request is answered.

    together: not before so many have been under way at once. delay: seconds before the first
    chunk, gap: before each later one. ending: "whole"; "cut", the connection ends after the first
    token; "short", the stream does; "error", an error comes instead of the second token;
    "uncounted", without usage; "garbage", no JSON.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    together: int = 0
    delay: float = 0.0
    gap: float = 0.0
    ending: str = "whole"


class ScriptedServer:
    """Serves on a thread of its own; use it as a context.

    script: from a streamed request's number and body to how it is answered. refused: a field
    whose presence is answered by status 400. Of what happened: `bodies` of streamed requests,
    `probes`, those of others, and `most_at_once`.
    """

    def __init__(
        self,
        script: Callable[[int, dict[str, Any]], Script] = lambda number, body: Script(),
        *,
        api_key: str | None = None,
        refused: str | None = None,
        models: tuple[str, ...] = (MODEL,),
    ) -> None:
        self._script, self._api_key, self._refused = script, api_key, refused
        self._models = models
        self.bodies: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._at_once = 0
        self.url = ""

    def __enter__(self) -> ScriptedServer:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *raised: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await self._stop.wait()
        await runner.cleanup()

    def _denied(self, request: web.Request) -> web.Response | None:
        if self._api_key in (None, request.headers.get("Authorization", "")[len("Bearer ") :]):
            return None
        return web.json_response({"error": {"message": "wrong key"}}, status=401)

    async def _list_models(self, request: web.Request) -> web.Response:
        entries = [{"id": name, "owned_by": "tests"} for name in self._models]
        return self._denied(request) or web.json_response({"object": "list", "data": entries})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        usage = {"prompt_tokens": _count(body), "prompt_tokens_details": {"cached_tokens": 3}}
        if self._refused in body:
            message = f"{self._refused} is not supported"
            return web.json_response({"error": {"message": message}}, status=400)
        if not body.get("stream"):
            self.probes.append(body)
            return web.json_response({"choices": [], "usage": {**usage, "completion_tokens": 1}})
        self.bodies.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._stream(request, body, usage)
        finally:
            self._at_once -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], usage: dict[str, Any]
    ) -> web.StreamResponse:
        script = self._script(len(self.bodies) - 1, body)
        if script.status != 200:
            message = {"error": {"message": "as scripted"}}
            return web.json_response(message, status=script.status, headers=script.headers)
        tokens = body.get("max_tokens") or body["max_completion_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while self.most_at_once < script.together:
            await asyncio.sleep(0.002)
        await asyncio.sleep(script.delay)
        for index in range(tokens):
            if index:
                await asyncio.sleep(script.gap)
                if script.ending == "cut":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if script.ending == "short":
                    return response
                if script.ending == "error":
                    await _send(response, {"error": {"message": "out of luck"}})
                    return response
                if script.ending == "garbage":
                    await response.write(b"data: {\n\n")
                    return response
            await _send(response, _chunk({"content": "x"}))
        await _send(response, _chunk({}, "length"))
        if script.ending != "uncounted":
            counts = {**usage, "completion_tokens": tokens}
            await _send(response, {"choices": [], "usage": counts})
        await response.write(b"data: [DONE]\n\n")
        return response


def _count(body: dict[str, Any]) -> int:
    """7 tokens of template, and 2 for each word."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [part.get("text", "") for part in parts]
    return 7 + TOKENS_PER_WORD * sum(len(text.split()) for text in texts)


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
