"""`/v1/responses`."""

from __future__ import annotations

import time
from contextlib import closing

from fastapi import APIRouter, Request, Response

from glmcompile.serve.errors import ERRORS
from glmcompile.serve.events import EventStream
from glmcompile.serve.protocol.responses import ModelResponse, ResponsesRequest
from glmcompile.serve.responses import ResponseWriter
from glmcompile.serve.routes.json_route import JsonRoute, json_response
from glmcompile.serve.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", response_model=ModelResponse, responses=ERRORS)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, whole or as typed server-sent events."""
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    prompt = body.prompt()
    form = body.form(service.forms, prompt)
    params = body.params(service.defaults, form.grammar)
    id = request.state.request_id
    writer = ResponseWriter(body, form, params, id, int(time.time()), model, service.texts)
    exchange = await service.begin(
        request, body, [prompt], params, streamed=body.stream, shown=form.markers
    )
    if body.stream:
        return EventStream(exchange, writer.events(exchange))
    with closing(exchange):
        return json_response(writer.whole((await exchange.completions())[0]))
