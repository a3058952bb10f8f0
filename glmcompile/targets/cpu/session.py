"""Opens ONNX Runtime sessions on the CPU that know the native operators."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime as ort

from glmcompile.errors import NativeLibraryError
from glmcompile.native import library_path


def default_threads() -> int:
    """Cores this process may run on, which container limits can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    graph: Path | bytes, threads: int | None = None, profile: Path | None = None
) -> ort.InferenceSession:
    """Open a component graph on ONNX Runtime's CPU provider.

    graph: its file, or the serialized model itself.
    threads: size of the intra-op pool, the calling thread included; None means every usable core.
    profile: prefix of the JSON trace that ONNX Runtime writes when the session ends.
    Raises NativeLibraryError where the custom-op library is missing or refused.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Sessions take turns within a step; a pool that kept spinning after its own run would take the
    # cores from the next component's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    library = library_path()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime raises its own unnamed types here
        raise NativeLibraryError(
            f"{library}: ONNX Runtime {ort.__version__} cannot load the operators ({error}). "
            "Reinstall glmcompile so that the library is built for this machine."
        ) from error
    source = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
