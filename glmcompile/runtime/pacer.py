"""How much prefill and image encoding fits beside decoding, learnt from how long steps take.

Sarathi (Agrawal et al. 2023) bounds the time between an answer's tokens by a fixed chunk of
prefill. What a chunk costs differs by two orders of magnitude between models and processors, so
here the bound is a time, as a multiple of a step that only decodes, and the chunk follows.
"""

from __future__ import annotations

# A step with prefill, or with a pause for the encoder after it, takes this many times one without.
STRETCH = 2.0
# Seconds of a step without decodes: what a new request, or a cancelled one, may have to wait.
LONGEST_STEP = 0.5
# Tokens of prefill in a step, at the least, and until their cost is known.
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
        self._mixed_steps = 0

    def prefill_tokens(self, decoding: bool) -> int | None:
        """Tokens of prefill the next step may have; None where nothing is known against it."""
        if decoding:
            if self._decode is None or self._mixed_steps >= _LOOK_AGAIN:
                return 0
            room, cost = (STRETCH - 1) * self._decode, self._beside or self._prefill
            return FIRST_PREFILL if cost is None else max(MIN_PREFILL, int(room / cost))
        if self._prefill is None:
            return None
        return max(MIN_PREFILL, int(LONGEST_STEP / self._prefill))

    def pause(self, seconds: float, decoding: bool) -> float:
        """Seconds to leave to the encoder after a step of `seconds`.

        Without decodes nobody waits for the next token, and the earlier request goes first.
        """
        if not decoding or self._decode is None:
            return seconds / 4
        return max(STRETCH * self._decode - seconds, self._decode / 4)

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
                # Tokens that ride along for nothing, as where weights come from memory, cost little
                # and not nothing: no single step is to take hundreds because of one lucky one.
                added = max(seconds - self._decode, self._decode / 16)
                self._beside = _average(self._beside, added / prefill_tokens)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
