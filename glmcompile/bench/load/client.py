"""A server under load: what it says of itself, and requests to it.

aiohttp, because it takes the least from a server on the same cores: 70 microseconds a streamed
chunk, httpx 150 to 190.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from glmcompile.bench.load.answer import (
    Answer,
    RequestError,
    count_tokens,
    error_message,
    read_answer,
)
from glmcompile.bench.load.workload import generator, random_words
from glmcompile.errors import InputError

_PROBE_WORDS = (32, 160)
_LIMITS = ("max_tokens", "max_completion_tokens")


class ServerClient:
    """Speaks to one server; use it as an asynchronous context.

    url: of the server, with or without /v1. timeout: seconds a request may take in all.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise InputError(f"--url {url}: expected http://host:port or https://host.")
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> ServerClient:
        # One for each request, whatever their number: some servers close a connection that was kept
        # without saying so, and whoever writes into it meanwhile would count a failure.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
        )
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._session.close()

    async def describe(self, model: str | None) -> dict[str, Any]:
        """The server's url, version if it tells one, and `model`, the first it has unless given.

        Raises InputError when no server answers, the key is refused or the model is not there.
        """
        status, body = await self._get("/v1/models")
        if status in (401, 403):
            raise InputError(
                f"{self.url}: refused the API key (status {status}: {error_message(body)}); "
                "give another by --api-key or OPENAI_API_KEY."
            )
        entries = _model_entries(body) if status == 200 else []
        if not entries and model is None:
            raise InputError(
                f"{self.url}/v1/models: names no model (status {status}: {error_message(body)}); "
                "check that --url is an OpenAI-compatible server, or give --model."
            )
        model = model or str(entries[0]["id"])
        entry = next((each for each in entries if each["id"] == model), None)
        if entries and entry is None:
            names = ", ".join(str(each["id"]) for each in entries)
            raise InputError(f"--model {model}: {self.url} does not have it; it has {names}.")
        described: dict[str, Any] = {"url": self.url, "model": model}
        for name in ("owned_by", "max_model_len"):
            if entry is not None and entry.get(name) is not None:
                described[name] = entry[name]
        status, body = await self._get("/version")
        if status == 200:
            described["version"] = _version(body)
        return described

    async def probe(self, model: str, fields: Mapping[str, Any], seed: int) -> tuple[str, float]:
        """Two short requests: the field that limits an answer, and tokens in a random word.

        fields: others that the load's requests will have. Raises InputError when the server
        refuses them, or answers without token counts.
        """
        rng = generator(seed, "probe")
        counts = []
        limit = _LIMITS[0]
        for words in _PROBE_WORDS:
            messages = [{"role": "user", "content": random_words(words, rng)}]
            body = {"model": model, "messages": messages, "temperature": 0, **fields}
            try:
                try:
                    counts.append(await self._count(body | {limit: 1}))
                except RequestError as error:
                    # Newer models of OpenAI's own know the second name alone.
                    if error.status != 400 or limit == _LIMITS[1]:
                        raise
                    limit = _LIMITS[1]
                    counts.append(await self._count(body | {limit: 1}))
            except RequestError as error:
                raise InputError(
                    f"{self.url}: a first short request failed ({error.kind}: {error}); "
                    "check --model and the options of the workload."
                ) from error
        growth = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
        if growth <= 0:
            raise InputError(
                f"{self.url}: counted {counts[0]} prompt tokens for {_PROBE_WORDS[0]} words and "
                f"{counts[1]} for {_PROBE_WORDS[1]}; a server that counts its tokens was expected."
            )
        return limit, growth

    async def stream(self, body: bytes) -> Answer:
        """Send a chat completion and read its streamed answer. Raises RequestError."""
        async with _Errors(), self._post(body) as response:
            await _refuse_errors(response)
            if "text/event-stream" not in response.headers.get("Content-Type", ""):
                found = response.headers.get("Content-Type")
                raise RequestError("malformed", f"text/event-stream was expected, not {found}")
            return await read_answer(response.content.iter_any())

    async def _count(self, body: dict[str, Any]) -> int:
        """Prompt tokens of a chat completion that is not streamed. Raises RequestError."""
        async with _Errors(), self._post(json.dumps(body).encode()) as response:
            await _refuse_errors(response)
            text = await response.text(errors="replace")
        try:
            return count_tokens(json.loads(text).get("usage"))[0]
        except (ValueError, AttributeError) as error:
            raise RequestError("malformed", f"not a chat completion: {text[:100]!r}") from error

    def _post(self, body: bytes) -> Any:
        # From a file, so that a large picture does not keep other requests waiting.
        return self._session.post(
            f"{self.url}/v1/chat/completions",
            data=io.BytesIO(body),
            headers={"Content-Type": "application/json"},
        )

    async def _get(self, path: str) -> tuple[int, str]:
        try:
            async with self._session.get(self.url + path) as response:
                return response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise InputError(
                f"{self.url}: no server answers there ({str(error) or type(error).__name__}); "
                "start it, or give its address by --url."
            ) from error


class _Errors:
    """Turns what the network raises into RequestError."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, asyncio.TimeoutError):
            raise RequestError("time-out", "no whole answer within --timeout") from error
        if isinstance(error, aiohttp.ClientError | OSError):
            raise RequestError("connection", str(error) or type(error).__name__) from error


async def _refuse_errors(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        message = error_message(await response.text(errors="replace"))
        after = response.headers.get("Retry-After", "")
        raise RequestError(
            f"HTTP {response.status}",
            message,
            status=response.status,
            retry_after=float(after) if after.isdecimal() else None,
        )


def _model_entries(body: str) -> list[dict[str, Any]]:
    try:
        return [each for each in json.loads(body)["data"] if "id" in each]
    except (ValueError, KeyError, TypeError):
        return []


def _version(body: str) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    version = found.get("version") if isinstance(found, dict) else found
    return None if version is None else str(version)
