"""Errors as clients see them: OpenAI's shape, the right status, and never a traceback."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from glmcompile.errors import (
    ClosedError,
    DeadlineError,
    GlmcompileError,
    InputError,
    OverloadedError,
)

# What a field of the request was written in; not part of its name.
_PLACES = ("body", "query", "path", "header")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503)
}


class ApiError(HTTPException):
    """A request that is not answered as asked, with all that its client is told.

    param: the field at fault, `messages.0.content`; code: OpenAI's word for the case.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        detail = ErrorDetail(
            message=self.detail, type=_type(self.status_code), param=self.param, code=self.code
        )
        return {"error": detail.model_dump()}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: Exception, request_id: str = "") -> ApiError:
    """What a client is told of an exception; of an unexpected one nothing but where to ask."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            headers = dict(error.headers) if error.headers else None
            return ApiError(error.status_code, str(error.detail), headers=headers)
        case InputError():
            return ApiError(400, str(error))
        case OverloadedError():
            after = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(429, str(error), code="overloaded", headers=after)
        case ClosedError():
            return draining(str(error))
        case DeadlineError():
            return ApiError(408, str(error), code="timeout")
        case GlmcompileError():
            return ApiError(500, str(error))
        case _:
            where = f"; the server's log has more under the request id {request_id}"
            return ApiError(500, f"internal error{where if request_id else ''}")


def draining(message: str = "the server is shutting down; ask another one") -> ApiError:
    """The answer to requests that come after the server was told to stop."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "1"})


def install(app: FastAPI) -> None:
    """Give every error that FastAPI, Starlette or a route raises OpenAI's shape."""

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, request.state.request_id).response

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation(error).response

    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(GlmcompileError, failed)
    app.add_exception_handler(RequestValidationError, invalid)


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, by its name."""
    first = error.errors()[0]
    path = [str(place) for place in first["loc"]]
    name = ".".join(path[1:] if path and path[0] in _PLACES else path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field; it would be ignored, so leave it out"
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None)


def _type(status: int) -> str:
    """OpenAI's coarse kinds."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
