"""What the server says of itself: models, health, readiness, version."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from glmcompile.serve.errors import ERRORS, ApiError
from glmcompile.serve.protocol.models import Model, ModelList
from glmcompile.serve.service import Service

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def models(request: Request) -> ModelList:
    """Every name of the model that is served."""
    service: Service = request.app.state.service
    return ModelList(data=[_model(service, name) for name in service.settings.model_names])


@router.get("/v1/models/{id:path}", response_model=Model, responses=ERRORS)
async def model(id: str, request: Request) -> Model:
    """One of them."""
    service: Service = request.app.state.service
    return _model(service, service.model_name(id))


@router.get("/health", response_class=Response)
async def health() -> Response:
    """200 as long as the process answers at all."""
    return Response()


@router.get("/ready", response_class=Response, responses={503: ERRORS[503]})
async def ready(request: Request) -> Response:
    """200 while requests are taken; 503 while shutting down, or while steps keep failing."""
    service: Service = request.app.state.service
    if service.draining:
        raise ApiError(503, "shutting down", code="unavailable")
    if not service.engine.stats().healthy:
        raise ApiError(503, "the engine's last steps failed", code="unhealthy")
    return Response()


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this package."""
    return {"version": importlib.metadata.version("glmcompile")}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """The engine's figures for Prometheus, under vLLM's names."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model(service: Service, name: str) -> Model:
    return Model(id=name, created=service.started, max_model_len=service.max_model_len)
