"""Servers that tests talk to: real ones, on a free port, each with an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import glmcompile
from tests.engines import TinyEngine
from tests.serve.servers import ServerThread

REFERENCE = Path("calibration/reference")


@pytest.fixture(scope="session")
def reference_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint's engine, in float32, which takes no calibration."""
    path = tmp_path_factory.mktemp("reference") / "engine"
    glmcompile.compile(REFERENCE, path, precision="fp32")
    return path


@pytest.fixture(scope="session")
def server(reference_engine: Path) -> Iterator[ServerThread]:
    """A server of the reference checkpoint; tests leave it without work."""
    with ServerThread(reference_engine, model_names=("reference", "alias")) as running:
        yield running


@pytest.fixture(scope="session")
def serve(
    tiny_engine: Callable[[str], TinyEngine], reference_engine: Path
) -> Iterator[Callable[..., ServerThread]]:
    """(family or "reference", settings and engine options) -> a server of its own."""
    with ExitStack() as stack:

        def start(name: str = "reference", **options: object) -> ServerThread:
            path = reference_engine if name == "reference" else tiny_engine(name).path
            return stack.enter_context(ServerThread(path, **options))

        yield start
