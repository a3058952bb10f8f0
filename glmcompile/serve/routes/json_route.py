"""Routes that read JSON: nothing else is taken for it, and neither depth nor size does harm."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json

from glmcompile.serve.errors import ApiError
from glmcompile.serve.service import Service


def json_response(value: Any, status: int = 200) -> Response:
    """value: a pydantic model or plain data."""
    return Response(to_json(value), status, media_type="application/json")


class _JsonRequest(Request):
    def __init__(self, request: Request, most: int) -> None:
        """most: bytes of the body."""
        super().__init__(request.scope, request.receive)
        self._most = most
        self._whole: bytes | None = None

    async def body(self) -> bytes:
        """Stops reading where the body turns out to be too large."""
        if self._whole is None:
            announced = self.headers.get("content-length", "0")
            self._check(int(announced) if announced.isascii() and announced.isdigit() else 0)
            read = bytearray()
            async for piece in self.stream():
                read += piece
                self._check(len(read))
            self._whole = bytes(read)
        return self._whole

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ApiError(
                413,
                f"the body is larger than {self._most:,} bytes; send smaller or fewer images",
                headers={"Connection": "close"},  # the rest of it is not read
            )

    async def json(self) -> Any:
        try:
            # Refuses nesting deeper than it can follow, and takes half the time of json.loads.
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class JsonRoute(APIRoute):
    """A route whose body is JSON by its content type.

    A page of another origin can send text without asking first, but not this type.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(
                        415, f"content-type is {kind!r}; send the body as application/json"
                    )
            service: Service = request.app.state.service
            return await handler(_JsonRequest(request, service.settings.max_body))

        return handle
