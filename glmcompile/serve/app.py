"""The HTTP application: routes and, around them, what every request passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from glmcompile.runtime.engine import Engine
from glmcompile.serve import errors
from glmcompile.serve.metrics import Metrics
from glmcompile.serve.middleware import ApiKey, RequestContext, TrustedOrigins
from glmcompile.serve.routes import chat, completions, generate, page, responses, status, tokenize
from glmcompile.serve.service import Service
from glmcompile.serve.settings import ServerSettings


def create_app(
    engine: Engine,
    settings: ServerSettings,
    metrics: Metrics,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> FastAPI:
    """An ASGI application that serves `engine`, which stays open as long as it runs.

    metrics: the engine's observer. record: takes the access log's entries.
    `app.state.service` is the Service; setting its `draining` ends admission.
    """
    app = FastAPI(
        title="glmcompile",
        docs_url=None,  # the pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = Service(engine, settings)
    app.state.metrics = metrics
    errors.install(app)
    for routes in (chat, completions, responses, generate, tokenize, status, page):
        app.include_router(routes.router)
    # The last one added is the outermost.
    if settings.api_key is not None:
        app.add_middleware(ApiKey, key=settings.api_key)
    elif "*" not in settings.cors_origins:
        app.add_middleware(TrustedOrigins, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestContext, record=record)
    return app
