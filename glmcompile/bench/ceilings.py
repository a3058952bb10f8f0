"""What the processor can do at best: bytes read, and operands multiplied, per second."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import InputError
from glmcompile.native import library_path

REPEATS = 8
MIN_SECONDS = 0.05  # of one repetition: long against starting the threads
_READ_STEP = 128  # floats; kReadStep of native/src/ceilings.h
_ROUNDS = 4096  # of multiplications in one native call


class Ceilings:
    """Runs the native library's loops that only read or only multiply, in pinned threads.

    Every figure is what all threads reach together, the best of several repetitions; operations
    are two per multiply-accumulate. They are those of the instructions that LinearW8A8 chooses,
    which the environment variable GLMCOMPILE_ISA caps.
    """

    def __init__(self, threads: int) -> None:
        """Raises NativeLibraryError without the library, InputError for a wrong GLMCOMPILE_ISA."""
        self._library = ctypes.CDLL(str(library_path()))
        self._library.glmcompile_linear_isa.restype = ctypes.c_char_p
        self._library.glmcompile_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        for function in (
            self._library.glmcompile_multiply_int8,
            self._library.glmcompile_multiply_float,
        ):
            function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
        self.isa = self._library.glmcompile_linear_isa().decode()
        if not self.isa:
            raise InputError(
                f"GLMCOMPILE_ISA is {os.environ['GLMCOMPILE_ISA']!r}, which names no instruction "
                "set; unset it or see the README"
            )
        self._threads = threads
        self._barrier = threading.Barrier(threads)
        self._pool = ThreadPoolExecutor(threads, initializer=_pin, initargs=(count(),))

    def read_gb_per_s(self, size: int) -> float:
        """Reading one buffer of `size` bytes again and again, each thread a part of it."""
        part = max(size // 4 // self._threads // _READ_STEP, 1) * _READ_STEP
        # Written before it is read: untouched pages would all be the same page of zeros.
        return self._read(np.ones(self._threads * part, np.float32))

    def mapped_gb_per_s(self, file: Path) -> float:
        """Reading a file where it is mapped, each thread a part of it.

        Pages of a file may lie in slower memory than a fresh buffer does, and in smaller pieces.
        """
        values = np.memmap(file, np.float32, "r")
        part = values.size // self._threads // _READ_STEP * _READ_STEP
        return self._read(values[: self._threads * part])

    def _read(self, values: NDArray[np.float32]) -> float:
        part = values.size // self._threads

        def read(thread: int, passes: int) -> int:
            for _ in range(passes):
                self._library.glmcompile_read(values.ctypes.data + thread * 4 * part, part)
            return passes * 4 * part

        return self._best(read) / 1e9

    def int8_gop_per_s(self) -> float:
        """Multiplying int8."""
        multiply = self._library.glmcompile_multiply_int8
        return self._best(lambda _, times: multiply(times * _ROUNDS)) / 1e9

    def float32_gop_per_s(self) -> float:
        """Multiplying float32."""
        multiply = self._library.glmcompile_multiply_float
        return self._best(lambda _, times: multiply(times * _ROUNDS)) / 1e9

    def __enter__(self) -> Ceilings:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def _best(self, work: Callable[[int, int], int]) -> float:
        """work(thread, times) does something `times` times and returns how much that was.

        Returns the most per second.
        """
        times = 1
        while (run := self._run(work, times))[1] < MIN_SECONDS:
            times *= 2
        runs = [run, *(self._run(work, times) for _ in range(REPEATS - 1))]
        return max(amount / seconds for amount, seconds in runs)

    def _run(self, work: Callable[[int, int], int], times: int) -> tuple[int, float]:
        """What all threads did, and the seconds from the first's beginning to the last's end."""

        def timed(thread: int) -> tuple[int, float, float]:
            # Every thread of the pool waits here, so each takes one part.
            self._barrier.wait()
            began = time.perf_counter()
            amount = work(thread, times)
            return amount, began, time.perf_counter()

        amounts, began, ended = zip(*self._pool.map(timed, range(self._threads)), strict=True)
        return sum(amounts), max(ended) - min(began)


def _pin(numbers: Iterator[int]) -> None:
    """Tie the calling thread to a core, where the system can, so that no two share one."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[next(numbers) % len(cores)]})
