"""An engine called as a Hugging Face pipeline is: an image and a prompt in, a response out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from glmcompile.errors import InputError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.options import EngineOptions


class AutoGLMPipeline:
    """One question at a time from each thread; calls of several threads are computed together."""

    def __init__(self, engine: Engine) -> None:
        """engine: open; closed with the pipeline."""
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        engine: str | Path,
        *,
        device_map: str | Mapping[str, Any] | None = "auto",
        **options: Any,
    ) -> AutoGLMPipeline:
        """Open an engine directory.

        device_map: "auto", "cpu", {"": "cpu"} or None: all mean the CPU, where an engine runs.
        options: the fields of EngineOptions (threads, kv_cache_bytes, ...).
        Raises InputError for another device_map or an option that does not exist, and ArtifactError
        for what is no engine, a checkpoint among it.
        """
        _check_device_map(device_map)
        return cls(Engine(engine, EngineOptions.from_options(options)))

    def __call__(self, *, prompt: str, image: Any = None, **options: Any) -> dict[str, str]:
        """Answer a prompt about an image: {"response": the answer's text}.

        image: a path, a Pillow image, a uint8 array [height, width, 3], a file's bytes or a data
        URL; a list of them; None or an empty list for a question without one.
        options: the fields of SamplingParams (max_tokens, temperature, ...); greedy without any.
        Raises InputError for anything that cannot be served, and what Engine.generate raises.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt is of type {type(prompt).__name__}; expected a string")
        images = (
            [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        )
        return {"response": self.engine.generate(prompt=prompt, images=images, **options).text}

    def close(self) -> None:
        """Release the engine; running calls end with a ClosedError."""
        self.engine.close()

    def __enter__(self) -> AutoGLMPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_device_map(device_map: Any) -> None:
    # A device of another type, as torch.device("cpu") is, says its name as a string.
    name = device_map[""] if isinstance(device_map, Mapping) and set(device_map) == {""} else None
    if device_map is None or str(device_map) in ("auto", "cpu") or str(name) == "cpu":
        return
    raise InputError(
        f"device_map is {device_map!r}; an engine runs on the CPU it was compiled for, which "
        'is "auto" or "cpu"'
    )
