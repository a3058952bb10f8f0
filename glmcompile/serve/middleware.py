"""What every request passes through: its id, its record, a net for what nobody expected."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmcompile.serve.errors import as_api_error
from glmcompile.serve.exchange import ClientGoneError

_LOG = logging.getLogger("glmcompile.serve")
# What may be written into a header and a log as it came.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives each request an id, the client's `x-request-id` where it sent one, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(id):
            id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except ClientGoneError:
            pass
        except Exception as error:
            _LOG.exception("request %s failed", id)
            if not started:
                await as_api_error(error, id).response(scope, receive, answer)
