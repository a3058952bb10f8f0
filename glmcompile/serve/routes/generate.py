"""`/v1/generate`."""

from __future__ import annotations

from contextlib import closing

from fastapi import APIRouter, Request, Response

from glmcompile.serve.errors import ERRORS
from glmcompile.serve.protocol.common import token_usage
from glmcompile.serve.protocol.generate import Generated, GenerateRequest
from glmcompile.serve.routes.json_route import JsonRoute, json_response
from glmcompile.serve.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/generate", response_model=Generated, responses=ERRORS)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Answer a text, with images or without."""
    service: Service = request.app.state.service
    exchange = await service.begin(
        request, body.parameters, [body.prompt()], body.params(service.defaults)
    )
    with closing(exchange):
        (done,) = await exchange.completions()
    return json_response(
        Generated(
            generated_text=done.text,
            finish_reason=done.finish_reason,
            usage=token_usage([done.usage]),
        )
    )
