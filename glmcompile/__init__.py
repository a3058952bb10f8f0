"""Compile a vision-language checkpoint to an engine (`compile`) and run it (`load`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmcompile.pipeline import AutoGLMPipeline
    from glmcompile.runtime.engine import Engine

__all__ = ["AutoGLMPipeline", "compile", "load"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, so that importing the package stays quick.
    if name == "AutoGLMPipeline":
        from glmcompile.pipeline import AutoGLMPipeline

        return AutoGLMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(engine: str | Path, **options: Any) -> Engine:
    """Open an engine directory for `generate`, `stream` and `step`.

    options: the fields of glmcompile.runtime.options.EngineOptions (threads, max_sequences, ...).
    Raises ArtifactError when the directory is not an engine, is damaged, or needs another machine.
    """
    from glmcompile.runtime.engine import Engine
    from glmcompile.runtime.options import EngineOptions

    return Engine(engine, EngineOptions(**options))


def compile(checkpoint: str | Path, output: str | Path, **options: Any) -> Any:
    """Compile a local Hugging Face checkpoint to an engine directory.

    options: those of glmcompile.compiler.compile_checkpoint (precision, ...). Needs the
    extra `compile` (torch, transformers).
    """
    from glmcompile.compiler import compile_checkpoint

    return compile_checkpoint(checkpoint, output, **options)
