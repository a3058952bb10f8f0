"""A server's life: bind, open the engine, serve, stop when told to, having finished what runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from glmcompile.errors import InputError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.options import EngineOptions
from glmcompile.serve.access_log import AccessLog
from glmcompile.serve.app import create_app
from glmcompile.serve.metrics import Metrics
from glmcompile.serve.service import Service
from glmcompile.serve.settings import ServerSettings

# Of connections whose answers are out, or whose clients read no more.
_CLOSING_SECONDS = 2


class Server(uvicorn.Server):
    """uvicorn, stopped by signals in two steps: no more requests first, no more server then."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None]) -> None:
        """app: from create_app. on_ready: called once connections are taken."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,  # uvicorn would tell the time by waking up for it
                lifespan="off",
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._service: Service = app.state.service
        self._on_ready = on_ready
        self._stopped: asyncio.Event = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Finish what runs, then end; on the event loop. A second call ends the process at once."""
        if self._drain is not None:
            os._exit(130)
        self._service.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def main_loop(self) -> None:
        """Sleep until stopped; uvicorn's own wakes up ten times a second to look."""
        await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server, which then ends as any program does."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not from a thread that is not the main one, as in tests.
            with contextlib.suppress(RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)
        yield

    async def _finish(self) -> None:
        await asyncio.to_thread(self._service.engine.drain, self._service.settings.grace)
        await asyncio.to_thread(self._service.engine.close)
        self.should_exit = True
        self._stopped.set()


def serve(
    engine: Path,
    options: EngineOptions,
    settings: ServerSettings,
    host: str,
    port: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve an engine directory until a signal ends it.

    port: 0 takes a free one. on_ready: called with the URL once requests are taken.
    Raises ArtifactError, and InputError for an address that cannot be had.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    listener = bind(host, port)
    log = AccessLog(settings.access_log) if settings.access_log is not None else None
    metrics = Metrics(settings.model_names[0])
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        if log is not None:
            stack.callback(log.close)
        loaded = stack.enter_context(Engine(engine, options, metrics))
        metrics.serve(loaded)
        app = create_app(loaded, settings, metrics, log.add if log is not None else None)
        stack.callback(app.state.service.preparation.close)
        server = Server(app, lambda: on_ready(url(listener)))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve([listener]))


def bind(host: str, port: int) -> socket.socket:
    """A socket of the address, not listening yet: clients wait for nothing that may fail."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port or "
            "--host, or stop the process that has it"
        ) from error
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
