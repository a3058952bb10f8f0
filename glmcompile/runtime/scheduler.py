"""Which sequences the next step computes and how much of each; policy only, no tensors.

Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al. 2023):
every step takes what each decoding sequence has, then fills its token budget with pieces of
prompts, by priority and then in order of arrival. An image is encoded before its tokens are
computed; which images come next is part of the schedule. When blocks run out, the youngest sequence
of the lowest priority is preempted; it starts over later, from its prompt and the answer so far
(vLLM's recompute).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from glmcompile.errors import InputError
from glmcompile.runtime.block_manager import BlockManager
from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.sequence import Chunk, Sequence, State


@dataclass(frozen=True)
class Schedule:
    """What a step does.

    images: those to encode, the one needed first at the beginning; their sequences wait for them.
    admitted: sequences that were given blocks just now, whether or not they are computed already.
    """

    chunks: list[Chunk] = field(default_factory=list)
    images: list[ProcessedImage] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """max_batched_tokens: tokens a step may compute; max_sequences: sequences that run at once.

    is_encoded: whether an image's features are there.
    Raises InputError unless every running sequence can have a token in each step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batched_tokens: int,
        max_sequences: int,
        is_encoded: Callable[[ProcessedImage], bool],
    ) -> None:
        if max_sequences < 1 or max_batched_tokens < max_sequences:
            raise InputError(
                f"max_batched_tokens is {max_batched_tokens} and max_sequences {max_sequences}; "
                "expected at least one sequence, and at least one token for each"
            )
        self._blocks = blocks
        self._max_batched_tokens = max_batched_tokens
        self._max_sequences = max_sequences
        self._is_encoded = is_encoded
        # Both by priority and then in order of arrival.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def fit(self, sequence: Sequence) -> None:
        """Shorten the answer to what the cache can hold; reads constants only, from any thread.

        Raises InputError when the prompt alone can never fit.
        """
        longest = max((end - start for start, end in sequence.whole), default=0)
        if longest + self._max_sequences > self._max_batched_tokens:
            raise InputError(
                f"{longest} tokens of the prompt see each other and have to be computed in one "
                f"step, which holds {self._max_batched_tokens} tokens less one for each of "
                f"{self._max_sequences} sequences; open the engine with a larger "
                "max_batched_tokens or use smaller images"
            )
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
        insort(self.waiting, sequence, key=_priority)

    def schedule(self, prefill_tokens: int | None = None) -> Schedule:
        """Choose the next step's work and reserve its blocks; decodes come first, then prefills.

        prefill_tokens: the most tokens of prompts to compute, where the budget would allow more.
        Without chunks when nothing is queued, or everything queued waits for an image.
        """
        plan = _Plan(self._max_batched_tokens, prefill_tokens)
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        prefilling = [sequence for sequence in self.running if not sequence.is_decoding]
        preempted = False
        for sequence in decoding + prefilling:
            if sequence.state is not State.RUNNING:
                continue
            while not self._blocks.can_append(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                plan.drop(victim)
                if victim is sequence:
                    break
            else:
                self._blocks.append(sequence)
                plan.choose(sequence, self._computable(sequence))
        # A sequence admitted right after a preemption would be the next to be preempted.
        admitted = []
        while self.waiting and not preempted and self._admits(self.waiting[0], plan):
            sequence = self.waiting.pop(0)
            self._blocks.allocate(sequence)
            sequence.state = State.RUNNING
            insort(self.running, sequence, key=_priority)
            admitted.append(sequence)
            plan.choose(sequence, self._computable(sequence))
        images = [
            span.image
            for sequence in self.running
            for span in sequence.pending_images
            if not self._is_encoded(span.image)
        ]
        return Schedule(list(plan.chunks.values()), images, admitted)

    def complete(self, chunk: Chunk) -> None:
        """Record that a step has computed this chunk."""
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

    def _computable(self, sequence: Sequence) -> int:
        """Tokens that can be computed now: up to the first image without features."""
        end = len(sequence)
        for span in sequence.pending_images:
            if not self._is_encoded(span.image):
                end = max(span.start, sequence.num_computed_tokens)
                break
        return end - sequence.num_computed_tokens

    def _admits(self, sequence: Sequence, plan: _Plan) -> bool:
        # Without tokens left it could do nothing but have its images encoded. One block stays in
        # reserve for each running sequence: they are about to grow.
        return (
            (plan.prefill_left > 0 or bool(sequence.images))
            and len(self.running) < self._max_sequences
            and self._blocks.can_allocate(sequence, reserve=len(self.running))
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        sequence.state = State.WAITING
        sequence.num_preemptions += 1
        place = bisect_left(self.waiting, _priority(sequence), key=_priority)
        self.waiting.insert(place, sequence)


class _Plan:
    """A step's chunks as they are chosen, within the budgets."""

    def __init__(self, tokens: int, prefill_tokens: int | None) -> None:
        self.chunks: dict[Sequence, Chunk] = {}
        self._left = tokens
        self._prefill_left = tokens if prefill_tokens is None else prefill_tokens

    @property
    def prefill_left(self) -> int:
        return min(self._left, self._prefill_left)

    def choose(self, sequence: Sequence, count: int) -> None:
        """Take as many of the sequence's next `count` tokens as the budgets hold.

        A range that is computed as a whole may go beyond what is wanted of prompts.
        """
        done = sequence.num_computed_tokens
        wanted = min(count, self._left if sequence.is_decoding else self.prefill_left)
        fits = sequence.uncut(done + wanted) - done
        if not fits and wanted > 0:
            ends = (stop for start, stop in sequence.whole if start <= done < stop)
            needed = next(ends, done) - done
            fits = needed if needed <= min(count, self._left) else 0
        count = fits
        if count > 0:
            self.chunks[sequence] = Chunk(sequence, sequence.num_computed_tokens, count)
            self._left -= count
            if not sequence.is_decoding:
                self._prefill_left -= count

    def drop(self, sequence: Sequence) -> None:
        """Take a preempted sequence out again."""
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self._left += chunk.count


def _priority(sequence: Sequence) -> int:
    return sequence.priority
