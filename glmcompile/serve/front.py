"""The application before several replicas: chooses one, passes its answer on, or tries another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import Message, Receive, Scope, Send

from glmcompile.serve import errors
from glmcompile.serve.affinity import conversation_key, order
from glmcompile.serve.errors import ApiError, draining
from glmcompile.serve.events import data
from glmcompile.serve.exchange import ClientGoneError
from glmcompile.serve.middleware import RequestContext
from glmcompile.serve.settings import ServerSettings

_LOG = logging.getLogger("glmcompile.serve")
_STATUS_SECONDS = 1.0  # between two questions to a replica
_PATIENCE = 5.0  # for the answer to one
_METHODS = ["GET", "POST", "OPTIONS"]
# What of a request's ASGI scope can be sent to another process, and says all of it.
_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "client", "server"),
)


class LostError(Exception):
    """A replica ended while it had a request."""


class _Place:
    """One replica as the front sees it; the replica itself comes and goes."""

    def __init__(self, number: int, handle: Any) -> None:
        """handle: a DeploymentHandle of glmcompile.serve.replicas.Replica."""
        self.number, self._handle = number, handle
        self.load = 0  # requests that are there
        self.up, self.healthy, self.metrics = True, True, b""
        self._lost = asyncio.Event()

    async def watch(self) -> None:
        """Follow the replica's state; never ends."""
        while True:
            await self.look()
            await asyncio.sleep(_STATUS_SECONDS)

    async def look(self) -> None:
        """Ask the replica for its state; one that does not answer in time is lost."""
        try:
            status = await asyncio.wait_for(self._handle.status.remote(), _PATIENCE)
        except Exception as error:
            self._lose(error)
            return
        self.healthy, self.metrics = status
        if not self.up:
            _LOG.warning("replica %d is up again", self.number)
        self.up = True
        self._lost.clear()

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The replica's ASGI messages. Raises LostError, also while it has not answered yet."""
        answer = self._handle.answer.options(stream=True).remote(scope, body)
        messages: AsyncIterator[Message] = aiter(answer)
        lost = asyncio.ensure_future(self._lost.wait())
        self.load += 1
        try:
            while True:
                following = asyncio.ensure_future(anext(messages))
                following.add_done_callback(_hear)
                try:
                    # A request to a replica that is not there would wait for the next one.
                    await asyncio.wait({following, lost}, return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        raise LostError(f"replica {self.number} is gone")
                    message = following.result()
                except StopAsyncIteration:
                    return
                except LostError:
                    raise
                except Exception as error:
                    self._lose(error)
                    raise LostError(f"replica {self.number} is gone") from error
                finally:
                    following.cancel()
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
        finally:
            self.load -= 1
            lost.cancel()
            answer.cancel()

    def _lose(self, error: Exception) -> None:
        if self.up:
            _LOG.warning("replica %d is gone (%s)", self.number, type(error).__name__)
        self.up = self.healthy = False
        self._lost.set()


class Front(Collector):
    """All replicas, and what the front itself knows of them; an async context while it serves."""

    def __init__(self, handles: Sequence[Any], settings: ServerSettings) -> None:
        self.settings = settings
        self.draining = False
        self.places = [_Place(number, handle) for number, handle in enumerate(handles)]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Front:
        loop = asyncio.get_running_loop()
        self._watchers = [loop.create_task(place.watch()) for place in self.places]
        return self

    async def __aexit__(self, *exception: object) -> None:
        for watcher in self._watchers:
            watcher.cancel()

    async def drain(self) -> None:
        """Until every request is answered, or the time that they have is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.grace):
                while any(place.load for place in self.places):
                    await asyncio.sleep(0.05)

    @property
    def ready(self) -> bool:
        return any(place.up and place.healthy for place in self.places)

    async def messages(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The answer of the first replica that begins one.

        Raises ApiError 503 when there is none, and LostError for a replica that is lost later.
        """
        for number in order(conversation_key(body), [place.load for place in self.places]):
            place = self.places[number]
            if not place.up:
                continue
            start: Message | None = None
            begun = False
            answer = place.ask(scope, body)
            try:
                async for message in answer:
                    if start is None:  # held until the rest is there, so that it can be dropped
                        start = message
                        continue
                    if not begun:
                        begun = True
                        yield start
                    yield message
                return
            except LostError:
                if begun:
                    raise
            finally:
                await answer.aclose()
        raise ApiError(
            503,
            "no replica is up; they are started again",
            code="unavailable",
            headers={"Retry-After": "1"},
        )

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        """What the replicas told last; each is an `engine` of its own."""
        families: dict[str, Metric] = {}
        for place in self.places:
            if place.up:
                for family in text_string_to_metric_families(place.metrics.decode()):
                    merged = families.setdefault(family.name, family)
                    if merged is not family:
                        merged.samples.extend(family.samples)
        return list(families.values())

    async def render(self) -> bytes:
        """The figures of the replicas that are up, for Prometheus."""
        await asyncio.gather(*(place.look() for place in self.places if place.up))
        return generate_latest(self._registry)


class _Passed(Response):
    """A replica's answer, passed on as it comes."""

    def __init__(self, front: Front, scope: Scope, body: bytes) -> None:
        super().__init__()
        self._front, self._body = front, body
        id = scope["state"]["request_id"].encode()
        headers = [item for item in scope["headers"] if item[0] != b"x-request-id"]
        self._scope = {name: scope[name] for name in _SCOPE if name in scope}
        self._scope["headers"] = [*headers, (b"x-request-id", id)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = asyncio.ensure_future(self._pass(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                raise ClientGoneError
            passing.result()
        finally:
            gone.cancel()
            passing.cancel()

    async def _pass(self, send: Send) -> None:
        streamed = False
        messages = self._front.messages(self._scope, self._body)
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    streamed = any(b"text/event-stream" in value for _, value in message["headers"])
                await send(message)
        except LostError as error:
            if not streamed:
                raise  # the connection is closed before the answer is whole
            told = ApiError(503, f"{error}; ask again", code="unavailable")
            await send({"type": "http.response.body", "body": data(told.body), "more_body": False})
        finally:
            await messages.aclose()


def _hear(task: asyncio.Future[Any]) -> None:
    """Ray ends a cancelled call with an error of its own, which nobody waits for any more."""
    if not task.cancelled():
        task.exception()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def create_front(front: Front) -> FastAPI:
    """An ASGI application with the routes of `create_app`.

    Health, readiness and metrics are its own; everything else a replica answers, keys and limits
    included.
    """
    app = FastAPI(
        openapi_url=None, max_body_size=front.settings.max_body, telemetry={"tracing": False}
    )
    app.state.service = front
    errors.install(app)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/ready")
    async def ready() -> Response:
        if front.draining:
            raise ApiError(503, "shutting down", code="unavailable")
        if not front.ready:
            raise ApiError(503, "no replica is up and healthy", code="unhealthy")
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await front.render(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/{path:path}", methods=_METHODS)
    async def answer(request: Request) -> Response:
        if front.draining:
            raise draining()
        return _Passed(front, request.scope, await request.body())

    app.add_middleware(RequestContext, record=None)
    return app
