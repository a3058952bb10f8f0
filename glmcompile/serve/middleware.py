"""What every request passes through: id, access log, API key, a net for what nobody expected."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmcompile.serve.errors import ApiError, as_api_error
from glmcompile.serve.exchange import ClientGoneError, Exchange

_LOG = logging.getLogger("glmcompile.serve")
# What may be written into a header and a log as it came.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Of the process and its load alone; asked by those that watch over it, which have no key. The page
# asks for the key itself.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
# nginx's status for a client that closed the connection; never sent, only logged.
_CLIENT_GONE = 499


class RequestContext:
    """Gives each request an id, the client's `x-request-id` where it sent one, and records it.

    `scope["state"]` holds request_id, and what routes add: exchange.
    """

    def __init__(self, app: ASGIApp, record: Callable[[dict[str, Any]], None] | None) -> None:
        """record: takes the access log's entries, None where there is no log."""
        self._app, self._record = app, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(id):
            id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = id
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except ClientGoneError:
            status = _CLIENT_GONE
        except Exception as error:
            _LOG.exception("request %s failed", id)
            if not status:
                await as_api_error(error, id).response(scope, receive, answer)
        if self._record is not None and (scope["path"] not in OPEN_PATHS or status >= 400):
            self._record(_entry(scope, state, status, time.perf_counter() - begun))


class ApiKey:
    """Requires the key as a bearer token on everything but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class TrustedOrigins:
    """Refuses what other web pages send to a server without a key; everything else has no Origin.

    A page is trusted that came from this server at a numeric address or at localhost, or is named.
    Any other name may be a stranger's that now resolves to this address (DNS rebinding), and a
    simple request needs no permission of the server (CORS).
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._trusts(origin, headers.get("host", "")):
                error = ApiError(
                    403,
                    f"web pages of {origin[:200]} may not call this server; start it with "
                    "--cors-origin to allow them, or with --api-key",
                    code="origin_not_allowed",
                )
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _trusts(self, origin: str, host: str) -> bool:
        return origin in self._origins or (
            origin.partition("://")[2] == host.lower() and _is_local(host.lower())
        )


def _is_local(host: str) -> bool:
    """Whether a Host header is a numeric address or localhost, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _entry(scope: Scope, state: dict[str, Any], status: int, seconds: float) -> dict[str, Any]:
    """One line of the log. Times are in seconds; ttft is that of the first answer."""
    client = scope.get("client")
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 6),
    }
    exchange: Exchange | None = state.get("exchange")
    if exchange is None:
        return entry
    finished = list(exchange.finished.values())
    if finished:
        entry |= {
            "prompt_tokens": exchange.prompt_tokens,
            "cached_tokens": finished[0].usage.cached_tokens,
            "completion_tokens": sum(done.usage.completion_tokens for done in finished),
            "ttft": round(min(done.timings.ttft for done in finished), 6),
            "finish_reason": finished[0].finish_reason,
        }
    if exchange.error is not None:
        entry["error"] = f"{type(exchange.error).__name__}: {exchange.error}"
    if exchange.gone:
        entry["status"] = _CLIENT_GONE
    return entry
