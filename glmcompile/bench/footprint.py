"""Load time, import time, peak memory: each measured in a fresh process of one engine alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from glmcompile.errors import GlmcompileError


def measure(
    engine: Path, threads: int, answer_tokens: int, samples: Path | None
) -> dict[str, float]:
    """Start a process that imports the runtime, loads the engine and answers one request.

    Returns import_ms, load_ms (files verified, as by default), peak_memory_mb. The engine's files
    are in the page cache unless it was never read. Raises GlmcompileError with its last words.
    """
    task = {
        "engine": str(engine.resolve()),
        "threads": threads,
        "answer_tokens": answer_tokens,
        "samples": None if samples is None else str(samples.resolve()),
    }
    process = subprocess.run(
        # -P: the installed package, whatever lies in the current folder.
        [sys.executable, "-P", "-m", "glmcompile.bench.footprint", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        raise GlmcompileError(
            f"{engine}: measuring it in a process of its own failed: "
            f"{(process.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike getrusage's maximum it does not begin with the parent's.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def _child(task: dict[str, Any]) -> dict[str, float]:
    began = time.perf_counter()
    import glmcompile.runtime.engine

    imported = time.perf_counter()
    engine = glmcompile.load(task["engine"], threads=task["threads"])
    loaded = time.perf_counter()
    from glmcompile.bench.compare import make_workloads

    samples = None if task["samples"] is None else Path(task["samples"])
    make_workloads(engine, task["answer_tokens"], samples, screen_count=1).representative(engine)
    return {
        "import_ms": (imported - began) * 1e3,
        "load_ms": (loaded - imported) * 1e3,
        "peak_memory_mb": peak_memory_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
