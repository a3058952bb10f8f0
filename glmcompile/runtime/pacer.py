"""How much prefill and image encoding fits beside decoding, learnt from how long steps take.

Sarathi (Agrawal et al. 2023) bounds the time between an answer's tokens by a fixed chunk of
prefill. What a chunk costs differs by two orders of magnitude between models and processors, so
here the bound is a time, as a multiple of a step that only decodes, and the chunk follows.
"""

from __future__ import annotations

# A step with prefill, or with a pause for the encoder after it, takes this many times one without.
# The slowest of a hundred without take a third longer than most do, so that the slowest with are
# less than twice as long: 1.8 times, where an image's first token comes 1.75 times as late.
STRETCH = 2.05
# Or this many seconds, where that is longer: 50 tokens a second are faster than anybody reads.
COMFORT = 0.02
# Seconds of a step without decodes: what a new request, or a cancelled one, may have to wait.
LONGEST_STEP = 0.5
# Or this many tokens, where they take longer: with fewer of them a large model would spend its time
# reading weights. At 10 billion parameters 15 tokens a step halved the speed of prefill.
FULL_PREFILL = 256
# Tokens of prefill in a step beside decodes, at the least, and until their cost is known.
MIN_PREFILL = 4
FIRST_PREFILL = 16
# Steps with prefill after which one without it is made, to see how long that takes by now.
_LOOK_AGAIN = 64
_WEIGHT = 0.2  # of the newest figure in an average


class Pacer:
    """Told of every step, says how large the next one may be."""

    def __init__(self) -> None:
        self._decode: float | None = None  # seconds of a step that only decodes
        self._prefill: float | None = None  # seconds a token of a step that only prefills
        self._beside: float | None = None  # seconds a token of prefill adds to a step that decodes
        self._tried = FIRST_PREFILL  # tokens of prefill of the last such step
        self._mixed_steps = 0

    def prefill_tokens(self, decoding: bool) -> int | None:
        """Tokens of prefill the next step may have; None where nothing is known against it."""
        if decoding:
            if self._decode is None or self._mixed_steps >= _LOOK_AGAIN:
                return 0
            room, cost = self._gap(self._decode) - self._decode, self._beside or self._prefill
            if cost is None:
                return FIRST_PREFILL
            # Tokens may ride along for nothing, as where weights come from memory, up to a point.
            return max(MIN_PREFILL, min(int(room / cost), 2 * self._tried))
        if self._prefill is None:
            return None
        return max(FULL_PREFILL, int(LONGEST_STEP / self._prefill))

    def pause(self, seconds: float, decoding: bool) -> float:
        """Seconds to leave to the encoder after a step of `seconds`.

        Without decodes nobody waits for the next token, and the earlier request goes first.
        """
        if not decoding or self._decode is None:
            return seconds / 4
        return max(self._gap(self._decode) - seconds, self._decode / 4)

    def observe(self, decode_tokens: int, prefill_tokens: int, seconds: float) -> None:
        """A step of so many tokens took `seconds`."""
        if not prefill_tokens:
            self._decode = _average(self._decode, seconds)
            self._mixed_steps = 0
        elif not decode_tokens:
            # The first tokens of a step cost most; a short one says little of a long one.
            if prefill_tokens >= FIRST_PREFILL:
                self._prefill = _average(self._prefill, seconds / prefill_tokens)
        else:
            self._mixed_steps += 1
            if self._decode is not None:
                self._tried = prefill_tokens
                added = max(seconds - self._decode, self._decode / 64)
                self._beside = _average(self._beside, added / prefill_tokens)

    @staticmethod
    def _gap(decode: float) -> float:
        """Seconds from one token to the next that are allowed."""
        return max(STRETCH * decode, COMFORT)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
