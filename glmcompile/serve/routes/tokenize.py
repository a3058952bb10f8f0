"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from glmcompile.runtime.input_processor import Prompt
from glmcompile.serve.errors import ERRORS
from glmcompile.serve.protocol.chat import chat_messages
from glmcompile.serve.protocol.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)
from glmcompile.serve.routes.json_route import JsonRoute, json_response
from glmcompile.serve.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=Tokenized, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """A prompt's tokens; of a chat those that its answer would be computed after."""
    service: Service = request.app.state.service
    service.model_name(body.model)
    if body.messages is None:
        encode = partial(
            service.engine.prompts.tokenizer.encode,
            body.prompt,
            add_special_tokens=body.add_special_tokens,
        )
        tokens = (await service.preparation.run(encode)).ids
    else:
        prompt = Prompt(
            messages=chat_messages(body.messages),
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            template_options=body.chat_template_kwargs,
            mm_processor_kwargs=body.mm_processor_kwargs,
        )
        prepare = partial(service.engine.prepare, prompt, policy=service.settings.policy)
        prepared = await service.preparation.run(prepare)
        tokens = prepared.sequence.token_ids
    return json_response(
        Tokenized(
            count=len(tokens),
            max_model_len=service.max_model_len,
            tokens=tokens,
            token_strs=[service.texts.name(id) for id in tokens]
            if body.return_token_strs
            else None,
        )
    )


@router.post("/detokenize", response_model=Detokenized, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    service: Service = request.app.state.service
    service.model_name(body.model)
    text = await service.preparation.run(partial(service.texts.decode, body.tokens))
    return json_response(Detokenized(prompt=text))
