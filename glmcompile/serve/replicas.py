"""Several processes of one engine on Ray Serve, and the front that spreads requests over them.

Each replica is a Ray Serve application of its own, so that the front chooses which one a request
goes to by Serve's stable interface (its request routers are not), and a replica that is started
again keeps its place. Serve starts, watches and restarts them; its HTTP proxies are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from glmcompile.artifact import open_artifact
from glmcompile.errors import InputError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.options import EngineOptions
from glmcompile.serve.access_log import AccessLog
from glmcompile.serve.app import create_app
from glmcompile.serve.front import Front, create_front
from glmcompile.serve.metrics import Metrics
from glmcompile.serve.server import Server, bind, url
from glmcompile.serve.settings import ServerSettings
from glmcompile.targets.cpu import default_threads

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read as ray is imported

import ray
from ray import serve as ray_serve

# Bodies of requests pass through it.
_OBJECT_STORE_BYTES = 256 << 20


class Replica:
    """One engine and its HTTP application, in a process that Serve watches."""

    def __init__(
        self, place: int, engine: Path, options: EngineOptions, settings: ServerSettings
    ) -> None:
        """place: which of the replicas this is; the label `engine` of its metrics."""
        self._stack = ExitStack()
        record = None
        if settings.access_log is not None:
            log = AccessLog(settings.access_log)
            self._stack.callback(log.close)
            record = log.add
        metrics = Metrics(settings.model_names[0], str(place))
        self._engine = self._stack.enter_context(Engine(engine, options, metrics))
        metrics.serve(self._engine)
        self._metrics = metrics
        self._app = create_app(self._engine, settings, metrics, record)
        self._stack.callback(self._app.state.service.preparation.close)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The application's ASGI messages for one request. Ends early when it is cancelled."""
        messages: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if whole:
                return whole.pop()
            await asyncio.Event().wait()  # a client that goes away cancels all of this
            raise AssertionError

        async def run() -> None:
            try:
                await self._app({**scope, "state": {}}, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.get_running_loop().create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield dict(message)
            await task
        finally:
            task.cancel()

    async def status(self) -> tuple[bool, bytes]:
        """Whether the engine is healthy, and its metrics as Prometheus text."""
        return self._engine.stats().healthy, self._metrics.render()

    async def check_health(self) -> None:
        """Serve's question; the process that answers it is alive.

        An engine whose steps fail is no reason to lose its caches: it turns readiness off.
        """

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # where it failed to begin
            self._stack.close()


class _FrontServer(Server):
    """The front's life: as a server's, but that what it stops are replicas."""

    def __init__(self, app: Any, front: Front, on_ready: Callable[[], None]) -> None:
        super().__init__(app, on_ready)
        self._front = front

    async def _finish(self) -> None:
        await self._front.drain()
        self.should_exit = True
        self._stopped.set()


def serve(
    engine: Path,
    options: EngineOptions,
    settings: ServerSettings,
    host: str,
    port: int,
    replicas: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve an engine directory by several processes until a signal ends them.

    options: of each replica; without `threads` they share the cores. With the variable RAY_ADDRESS
    the replicas run on that cluster, where the engine has to be at the same path on every machine
    and each replica asks for `threads` cores; otherwise they run on this machine.
    Raises ArtifactError, InputError, and RuntimeError for replicas that do not start.
    """
    if settings.access_log is not None and str(settings.access_log) == "-":
        raise InputError("--access-log -: replicas have no stderr of yours; give a file")
    options = replace(options, threads=options.threads or max(1, default_threads() // replicas))
    options.context_length(open_artifact(engine, options.verify).model)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    settings = replace(
        settings, access_log=settings.access_log and Path(settings.access_log).resolve()
    )
    with ExitStack() as stack:
        listener = bind(host, port)
        stack.callback(listener.close)
        _connect(replicas, options)
        stack.callback(ray.shutdown)
        handles = _start(engine.resolve(), options, settings, replicas, stack)
        front = Front(handles, settings)
        app = create_front(front)
        server = _FrontServer(app, front, lambda: on_ready(url(listener)))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_run(server, front, listener))


async def _run(server: Server, front: Front, listener: Any) -> None:
    async with front:
        await server.serve([listener])


def _connect(replicas: int, options: EngineOptions) -> None:
    address = os.environ.get("RAY_ADDRESS", "local")
    own: dict[str, Any] = {}
    if address == "local":
        # Cores are divided by `threads`; that there are enough is the user's affair.
        own = {
            "num_cpus": replicas * (options.threads or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)


def _start(
    engine: Path,
    options: EngineOptions,
    settings: ServerSettings,
    replicas: int,
    stack: ExitStack,
) -> list[Any]:
    """Handles of the replicas, all of them ready; the stack deletes them."""
    quiet = {"log_level": "ERROR"}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray_serve.start(proxy_location="Disabled", logging_config=quiet)
    deployment: Any = ray_serve.deployment(
        Replica,
        max_ongoing_requests=2 * options.capacity,
        ray_actor_options={"num_cpus": options.threads},
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=1,  # the front has waited already
        logging_config={**quiet, "enable_access_log": False},
    )
    names = [f"glmcompile-{place}" for place in range(replicas)]
    for name in names:
        stack.callback(ray_serve.delete, name, _blocking=False)
    return ray_serve.run_many(
        [
            ray_serve.RunTarget(
                deployment.options(name=name).bind(place, engine, options, settings),
                name=name,
                route_prefix=None,
            )
            for place, name in enumerate(names)
        ]
    )
