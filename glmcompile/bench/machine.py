"""What figures were measured on: processor, instructions used, memory, versions."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import glmcompile
from glmcompile.artifact import cpu_features
from glmcompile.native import library_path

PACKAGES = ("glmcompile", "onnxruntime", "numpy")
# Instruction sets that make a difference here, as Linux names them.
_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)


def describe(threads: int) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement; JSON-serialisable."""
    present = cpu_features()
    return {
        **host(),
        "threads": threads,
        "isa": selected_isa(),
        "cpu_features": [name for name in _FEATURES if name in present],
    }


def host(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The machine and the versions of `packages`, whatever runs on it; JSON-serialisable.

    load_average: of the minute before, and so without the benchmark if this is called first; far
    above 0 means that something else was running.
    """
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": memory_gb(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git_commit": git_commit(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("model name", "hardware", "cpu model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def selected_isa() -> str:
    """The kernel level that the native library picks here, for example "avx512" or "amx"."""
    function = ctypes.CDLL(str(library_path())).glmcompile_selected_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())


def memory_gb() -> float | None:
    """Physical memory in GB (10^9 bytes); None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def git_commit() -> str | None:
    """The checkout's commit, "-dirty" added for changed files; None outside of a checkout."""
    package = Path(glmcompile.__file__).parent
    root = _git(package, "rev-parse", "--show-toplevel")
    # A virtual environment may lie inside somebody else's repository.
    if root is None or Path(root).resolve() != package.parent.resolve():
        return None
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
