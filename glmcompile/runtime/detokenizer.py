"""Token ids to text as they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# No character is longer than four bytes, so text that stays unfinished longer is not UTF-8.
_MAX_PENDING = 8


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that mark structure and have no text of their own."""
    return frozenset(
        id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )


class Detokenizer:
    """The text of one answer, growing by each token.

    `text` is what may be shown: it ends with whole characters, holds back what may be the beginning
    of a stop string, and never holds a stop string or what follows it. Special tokens are skipped.

    A token's text depends on its neighbours (UTF-8 split over tokens, a decoder that strips the
    first space), so each is decoded together with the tokens since the last clean boundary: the
    text of a new token is the decoding with it less the decoding without it. That is the window
    technique of text-generation-inference and vLLM (prefix offset and read offset).
    """

    def __init__(
        self, tokenizer: Tokenizer, special: Collection[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """special: ids to skip, of `special_ids`; stop: strings, none of them empty."""
        self._tokenizer = tokenizer
        self._special = special
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []  # since the start of the window
        self._prefix = 0  # tokens at the window's start whose text is out already
        self._decoded = ""
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """Take the next token and return the text that can be shown because of it, often ""."""
        if self.stopped_by is not None or token in self._special:
            return ""
        self._tokens.append(token)
        before = self._decode(self._tokens[: self._prefix])
        after = self._decode(self._tokens)
        if len(after) <= len(before):
            return ""
        # An unfinished character decodes to the replacement character.
        unfinished = self._unfinished(after) if after.endswith(_REPLACEMENT) else 0
        if unfinished == len(self._tokens):
            return ""
        if unfinished:
            after = self._decode(self._tokens[:-unfinished])
        finished = len(self._tokens) - unfinished
        self._tokens = self._tokens[self._prefix :]
        self._prefix = finished - self._prefix
        return self._append(after[len(before) :])

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes the replacement character."""
        if self.stopped_by is not None:
            return ""
        before = self._decode(self._tokens[: self._prefix])
        after = self._decode(self._tokens)
        self._tokens, self._prefix = [], 0
        shown = len(self.text)
        self._append(after[len(before) :])
        if self.stopped_by is None:
            self.text = self._decoded
        return self.text[shown:]

    def _unfinished(self, text: str) -> int:
        """How many of the window's last tokens to hold back; all of it while that is not known.

        Bytes that are not UTF-8 would otherwise be held back for ever: once a window is longer than
        any character, its last tokens are split off where that does not change the text.
        """
        if len(self._tokens) - self._prefix >= _MAX_PENDING:
            for count in range(1, 5):
                head, tail = self._tokens[:-count], self._tokens[-count:]
                if self._decode(head) + self._decode(tail) == text:
                    return count
        return len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""

    def _append(self, new: str) -> str:
        """Add decoded text, look for stop strings, and return what can be shown now."""
        shown = len(self.text)
        # A stop string that ends in the new text begins at most its length before it.
        start = max(0, len(self._decoded) - self._longest_stop + 1)
        self._decoded += new
        found = [
            (place, stop) for stop in self._stop if (place := self._decoded.find(stop, start)) >= 0
        ]
        if found:
            place, self.stopped_by = min(found)
            self._decoded = self._decoded[:place]
            self.text = self._decoded
        else:
            self.text = self._decoded[: len(self._decoded) - self._held_back()]
        return self.text[shown:]

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._decoded)), 0, -1):
            end = self._decoded[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
