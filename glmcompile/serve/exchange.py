"""One HTTP request's answers: prepared, submitted, collected on the event loop, given up with it.

The engine calls `deliver` on its stepping thread. Outputs wait in a deque, and the event loop is
woken only when it is not awake for them already; where nothing is streamed, only by the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from starlette.types import Receive

from glmcompile.runtime.engine import Engine
from glmcompile.runtime.request import Completion, Request, RequestOutput


class ClientGoneError(Exception):
    """The client closed the connection before it had an answer."""


class Indexed(NamedTuple):
    """What one step, or several that were not collected in time, gave one answer."""

    answer: int
    output: RequestOutput


class Exchange:
    """All answers of one HTTP request; `close` it in any case, which cancels what is unfinished.

    A closed connection cancels everything, and `outputs` ends as soon as the engine has let go.
    prompt_tokens: of all prompts. finished: the completions so far, by answer. error: what ended
    one of them instead. gone: whether the client is.
    """

    def __init__(self, engine: Engine, receive: Receive, *, streamed: bool) -> None:
        """receive: the connection's, its body read, so that it tells of a disconnect alone."""
        self._engine, self._receive = engine, receive
        self._streamed = streamed
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._woken = False
        self._outputs: deque[Indexed] = deque()
        self._ids: dict[int, int] = {}  # unfinished answers: index -> the engine's id
        self._siblings: dict[int, list[tuple[int, Request]]] = {}
        self.prompt_tokens = 0
        self.finished: dict[int, Completion] = {}
        self.error: Exception | None = None
        self.gone = False
        self._watcher = self._loop.create_task(self._watch())

    def submit(self, groups: Sequence[Sequence[Request]]) -> None:
        """Hand the answers of each prompt to the engine, numbered through.

        Only the first of a prompt goes at once: the others find its keys and values in the prefix
        cache when its first output has come.
        Raises OverloadedError or ClosedError, and ClientGoneError; nothing is left running then.
        """
        if self.gone:
            raise ClientGoneError
        index = 0
        for group in groups:
            self.prompt_tokens += group[0].sequence.num_prompt_tokens
            if len(group) > 1:
                self._streamed = True  # the first output matters, if to nobody but the others
                self._siblings[index] = list(enumerate(group[1:], index + 1))
            self._submit(index, group[0])
            index += len(group)

    async def outputs(self) -> AsyncIterator[Indexed]:
        """What the engine gives, until all answers are finished.

        An output with an error is an answer's last. Raises OverloadedError or ClosedError where a
        further answer of a prompt is not admitted.
        """
        while self._ids:
            await self._arrived.wait()
            self._arrived.clear()
            self._woken = False  # before the deque is read, so that what comes later wakes again
            for item in self._collect():
                if item.output.finished:
                    self._ids.pop(item.answer, None)
                if item.output.completion is not None:
                    self.finished[item.answer] = item.output.completion
                if item.output.error is not None:
                    self.error = item.output.error
                if not self.gone:
                    for index, request in self._siblings.pop(item.answer, ()):
                        self._submit(index, request)
                yield item

    async def completions(self) -> list[Completion]:
        """All answers, whole, in their order. Raises the first error that one of them met."""
        async for item in self.outputs():
            if item.output.error is not None:
                raise item.output.error
        if self.gone:
            raise ClientGoneError
        return self.answers

    @property
    def answers(self) -> list[Completion]:
        """The finished ones so far, in their order."""
        return [self.finished[index] for index in sorted(self.finished)]

    def close(self) -> None:
        """Give up what is unfinished; nothing is heard of it any more."""
        self._watcher.cancel()
        self._cancel()

    def _cancel(self) -> None:
        self._siblings.clear()
        for id in self._ids.values():
            self._engine.cancel(id)

    def _submit(self, index: int, request: Request) -> None:
        self._ids[index] = self._engine.submit(request, self._receiver(index))

    def _receiver(self, index: int) -> Callable[[RequestOutput], None]:
        return partial(self._deliver, index, self._streamed)

    def _deliver(self, index: int, streamed: bool, output: RequestOutput) -> None:
        """On the stepping thread."""
        if not (streamed or output.finished):
            return
        self._outputs.append(Indexed(index, output))
        # Without text there is nothing to show: the next output takes it along.
        if not self._woken and (output.text or output.finished):
            self._woken = True
            # A loop that has ended wants no outputs any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def _collect(self) -> list[Indexed]:
        """All that has come, what belongs to one answer joined."""
        joined: dict[int, RequestOutput] = {}
        while self._outputs:
            index, output = self._outputs.popleft()
            joined[index] = _joined(joined[index], output) if index in joined else output
        return [Indexed(index, output) for index, output in joined.items()]

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._cancel()


def _joined(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    return replace(
        later,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
    )
