"""A server in a thread of the test's process, and what tests look at in it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import openai

from glmcompile.runtime.engine import Engine
from glmcompile.runtime.options import EngineOptions
from glmcompile.serve.app import create_app
from glmcompile.serve.metrics import Metrics
from glmcompile.serve.server import Server, bind, url
from glmcompile.serve.settings import ServerSettings

_SETTINGS = {option.name for option in fields(ServerSettings)}
_PATIENCE = 60


class ServerThread:
    """The server of `glmcompile serve`, but for the command line. records: its access log."""

    def __init__(self, path: Path, **options: Any) -> None:
        """options: fields of ServerSettings and of EngineOptions."""
        chosen = {"model_names": ("model",), "grace": 10.0, **options}
        settings = ServerSettings(**{k: v for k, v in chosen.items() if k in _SETTINGS})
        engine = {k: v for k, v in chosen.items() if k not in _SETTINGS}
        defaults = {"threads": 2, "kv_cache_bytes": 32 << 20}
        metrics = Metrics(settings.model_names[0])
        self.engine = Engine(path, EngineOptions(**{**defaults, **engine}), metrics)
        metrics.serve(self.engine)
        self.records: list[dict[str, Any]] = []
        self.app = create_app(self.engine, settings, metrics, self.records.append)
        self._listener = bind("127.0.0.1", 0)
        self._ready = threading.Event()
        self._server = Server(self.app, self._ready.set)
        self._thread = threading.Thread(target=self._run)
        self._stopping = False
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> ServerThread:
        self._thread.start()
        assert self._ready.wait(_PATIENCE)
        self.url = url(self._listener)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive()
        self.engine.close()

    def stop(self) -> None:
        """As SIGTERM does; a second one would end this process."""
        if not self._stopping:
            self._stopping = True
            self.loop.call_soon_threadsafe(self._server.stop)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=_PATIENCE, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=_PATIENCE, **options)

    def events(self, path: str, body: Any) -> list[Any]:
        """The JSON of a streamed answer's events; the last is "[DONE]" where there is one."""
        with httpx.stream("POST", f"{self.url}{path}", json=body, timeout=_PATIENCE) as response:
            assert response.status_code == 200, response.read()
            return list(_parse(response.iter_lines()))

    def wait_until_idle(self) -> None:
        """Nothing is left of any request: none runs or waits, and every block is free."""
        wait_for(lambda: self.engine.stats().running + self.engine.stats().waiting == 0)
        assert self.engine.stats().kv_cache_usage == 0
        self.engine.check_integrity()

    def _run(self) -> None:
        factory = self._server.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner, closing(self._listener):
            self.loop = runner.get_loop()
            runner.run(self._server.serve([self._listener]))
        self.app.state.service.preparation.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def _parse(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
