"""Which sequences the next step computes and how much of each; policy only, no tensors.

Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al. 2023):
every step takes one token of each decoding sequence, then fills its token budget with pieces of
prompts, first come, first served. When blocks run out, the youngest sequence is preempted; it
starts over later, from its prompt and the answer so far (vLLM's recompute).
"""

from __future__ import annotations

from collections import deque

from glmcompile.errors import InputError
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.sequence import Chunk, Sequence, State


class Scheduler:
    """max_batched_tokens: tokens a step may compute; max_sequences: sequences that run at once.

    Raises InputError unless every running sequence can have a token in each step.
    """

    def __init__(self, blocks: BlockManager, max_batched_tokens: int, max_sequences: int) -> None:
        if max_sequences < 1 or max_batched_tokens < max_sequences:
            raise InputError(
                f"max_batched_tokens is {max_batched_tokens} and max_sequences {max_sequences}; "
                "expected at least one sequence, and at least one token for each"
            )
        self._blocks = blocks
        self._max_batched_tokens = max_batched_tokens
        self._max_sequences = max_sequences
        # Both in order of arrival, and every running sequence is older than every waiting one.
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def fit(self, sequence: Sequence) -> None:
        """Shorten the answer to what the cache can hold; reads constants only, from any thread.

        Raises InputError when the prompt alone can never fit.
        """
        capacity = self._blocks.num_blocks * self._blocks.block_size
        if len(sequence) > capacity:
            raise InputError(
                f"the prompt has {len(sequence)} tokens but the KV cache holds {capacity}; "
                "open the engine with a larger cache or shorten the prompt"
            )
        # The last token of an answer is never fed back, so it takes no room.
        sequence.max_tokens = min(sequence.max_tokens, capacity - sequence.num_prompt_tokens + 1)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's work and reserve its blocks; decodes come first, then prefills.

        Empty when nothing is queued.
        """
        budget = self._max_batched_tokens
        chosen: dict[Sequence, Chunk] = {}
        preempted = False
        decoding = [s for s in self.running if len(s) - s.num_computed_tokens == 1]
        prefilling = [s for s in self.running if len(s) - s.num_computed_tokens > 1]
        for sequence in decoding + prefilling:
            if sequence.state is not State.RUNNING or budget == 0:
                continue
            while not self._blocks.can_append(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim in chosen:
                    budget += chosen.pop(victim).count
                if victim is sequence:
                    break
            else:
                self._blocks.append(sequence)
                budget -= self._choose(sequence, budget, chosen)
        # A sequence admitted right after a preemption would be the next to be preempted.
        while self.waiting and budget and not preempted and self._admits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self._blocks.allocate(sequence)
            sequence.state = State.RUNNING
            self.running.append(sequence)
            budget -= self._choose(sequence, budget, chosen)
        return list(chosen.values())

    def complete(self, chunks: list[Chunk]) -> None:
        """Record that a step has computed these chunks."""
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.end
            self._blocks.commit(chunk.sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out and give back its blocks."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._blocks.free(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def _admits(self, sequence: Sequence) -> bool:
        # One block in reserve for each running sequence: they are about to grow.
        return len(self.running) < self._max_sequences and self._blocks.can_allocate(
            sequence, reserve=len(self.running)
        )

    def _choose(self, sequence: Sequence, budget: int, chosen: dict[Sequence, Chunk]) -> int:
        start = sequence.num_computed_tokens
        count = min(budget, len(sequence) - start)
        chosen[sequence] = Chunk(sequence, start, count)
        return count

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        sequence.state = State.WAITING
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
