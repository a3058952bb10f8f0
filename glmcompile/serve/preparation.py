"""Images decoded, prompts rendered and tokenized, in few threads that yield to the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from glmcompile.errors import OverloadedError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.request import Request
from glmcompile.runtime.sampling_params import SamplingParams

_NICE = 10

T = TypeVar("T")


class Preparation:
    """`Engine.prepare_several` without stalling event loop or decoding, few at once."""

    def __init__(self, engine: Engine, workers: int, limit: int) -> None:
        """limit: requests that are prepared or wait for it; further ones are refused."""
        self._engine, self._limit = engine, limit
        self._pending = 0
        self._threads = ThreadPoolExecutor(workers, "prepare", initializer=_yield_to_others)

    async def prepare(
        self, prompt: Prompt, samplings: Sequence[SamplingParams], **options: Any
    ) -> list[Request]:
        """See Engine.prepare_several; raises OverloadedError besides, where too many wait."""
        return await self.run(partial(self._engine.prepare_several, prompt, samplings, **options))

    async def run(self, work: Callable[[], T]) -> T:
        """Any other work of that kind."""
        if self._pending >= self._limit:
            raise OverloadedError(
                f"{self._pending} requests wait for their images and prompts to be read; "
                "try again later",
                retry_after=1.0,
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _yield_to_others() -> None:
    """Of this thread alone: Linux keeps a priority for each."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
