"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from contextlib import closing

from fastapi import APIRouter, Request, Response

from glmcompile.serve.chat import ChatAnswer
from glmcompile.serve.errors import ERRORS
from glmcompile.serve.events import EventStream
from glmcompile.serve.protocol.chat import ChatCompletion, ChatRequest
from glmcompile.serve.routes.json_route import JsonRoute, json_response
from glmcompile.serve.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, whole or as server-sent events."""
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    prompt = body.prompt()
    form = body.form(service.forms, prompt)
    exchange = await service.begin(
        request,
        body,
        [prompt],
        body.params(service.defaults, form.grammar),
        n=body.n,
        streamed=body.stream,
        shown=form.markers,
    )
    id = f"chatcmpl-{request.state.request_id}"
    answer = ChatAnswer(body, form, id, int(time.time()), model, service.texts)
    if body.stream:
        return EventStream(exchange, answer.events(exchange))
    with closing(exchange):
        return json_response(answer.whole(await exchange.completions()))
