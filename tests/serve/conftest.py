"""Servers that tests talk to: real ones, on a free port, each with an engine of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import glmcompile
from glmcompile.artifact import CHAT_TEMPLATE, MANIFEST, write_manifest
from glmcompile.contract import Contract
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


@pytest.fixture
def serve(reference_engine: Path, tmp_path: Path) -> Iterator[Callable[..., ServerThread]]:
    """(chat template, settings and engine options) -> a server of the test's own."""
    with ExitStack() as stack:

        def start(template: str | None = None, **options: Any) -> ServerThread:
            path = reference_engine
            if template is not None:
                path = with_template(path, template, tmp_path / "engine")
            return stack.enter_context(ServerThread(path, **options))

        yield start


def with_template(engine: Path, template: str, copy: Path) -> Path:
    """An engine that differs by its chat template."""
    shutil.copytree(engine, copy)
    file = copy / CHAT_TEMPLATE
    file.write_text(template)
    manifest = json.loads((copy / MANIFEST).read_text())
    model = Contract.from_json(manifest["model"])
    own = ("format_version", "model", "files", "sha256")
    write_manifest(copy, model, {k: v for k, v in manifest.items() if k not in own})
    return copy
