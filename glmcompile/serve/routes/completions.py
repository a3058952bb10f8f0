"""`/v1/completions`."""

from __future__ import annotations

import time
from contextlib import closing

from fastapi import APIRouter, Request, Response

from glmcompile.serve.completions import TextAnswer
from glmcompile.serve.errors import ERRORS
from glmcompile.serve.events import EventStream
from glmcompile.serve.protocol.completions import CompletionRequest, TextCompletion
from glmcompile.serve.routes.json_route import JsonRoute, json_response
from glmcompile.serve.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=TextCompletion, responses=ERRORS)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts, whole or as server-sent events."""
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    id = f"cmpl-{request.state.request_id}"
    answer = TextAnswer(body, id, int(time.time()), model, service.texts)
    exchange = await service.begin(
        request,
        body,
        body.prompts(),
        body.params(service.defaults),
        n=body.n,
        streamed=body.stream,
    )
    if body.stream:
        return EventStream(exchange, answer.events(exchange))
    with closing(exchange):
        return json_response(answer.whole(await exchange.completions()))
