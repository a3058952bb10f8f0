"""The HTTP application: routes and, around them, what every request passes through."""

from __future__ import annotations

from fastapi import FastAPI

from glmcompile.runtime.engine import Engine
from glmcompile.serve import errors
from glmcompile.serve.middleware import RequestContext
from glmcompile.serve.routes import chat, status
from glmcompile.serve.service import Service
from glmcompile.serve.settings import ServerSettings


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """An ASGI application that serves `engine`, which stays open as long as it runs.

    `app.state.service` is the Service; setting its `draining` ends admission.
    """
    app = FastAPI(
        title="glmcompile",
        docs_url=None,  # the pages load their scripts from elsewhere
        redoc_url=None,
        max_body_size=settings.max_body,
        telemetry={"tracing": False},
    )
    app.state.service = Service(engine, settings)
    errors.install(app)
    for routes in (chat, status):
        app.include_router(routes.router)
    app.add_middleware(RequestContext)
    return app
