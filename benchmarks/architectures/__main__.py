"""python -m benchmarks.architectures [types...]: one line per type, each in its own process."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import warnings
from multiprocessing.connection import Connection

import transformers

from benchmarks.architectures import check, types

SECONDS, MEMORY = 60, 4 << 30


def answer(model_type: str, results: Connection) -> None:
    """Send what `check` says, within the memory limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    results.send(check(model_type))


def run(model_type: str) -> str:
    """`check` in a fork, so that torch is imported once and no failure ends the others."""
    context = multiprocessing.get_context("fork")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        return results.recv() if results.poll(SECONDS) else f"over {SECONDS} s"
    except EOFError:
        return "ended without a result"
    finally:
        process.kill()
        process.join()


def main(chosen: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for model_type in chosen or types():
        start = time.monotonic()
        result = run(model_type)
        print(f"{model_type:24s} {time.monotonic() - start:4.0f} s  {result}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
