"""Single tokens as clients see them: their text, their bytes, log-probabilities of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from glmcompile.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# SentencePiece's sign for a space.
_SPACE_SIGN = "\u2581"


# JSON has no infinity; OpenAI writes this for tokens that cannot be.
_LEAST_LOGPROB = -9999.0


def shown_logprob(logprob: float | None) -> float:
    """A token's log-probability as JSON can hold it."""
    return max(logprob or 0.0, _LEAST_LOGPROB)


class TokenTexts:
    """What each token of a vocabulary stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def encoded(self, id: int) -> bytes:
        """A token's own bytes, which may be a part of a character."""
        known = self._known.get(id)
        if known is None:
            known = self._known[id] = self._bytes(id)
        return known

    def text(self, id: int) -> str:
        """A token's text; what is no character by itself becomes the replacement character."""
        return self.encoded(id).decode("utf-8", errors="replace")

    def name(self, id: int) -> str:
        """A token as the vocabulary writes it; "" for ids that stand for none."""
        return self._tokenizer.id_to_token(id) or ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of several, control tokens included. Raises InputError for what is no token."""
        size = self._tokenizer.get_vocab_size()
        if (wrong := next((id for id in ids if not 0 <= id < size), None)) is not None:
            raise InputError(f"token id {wrong} is not in the vocabulary of {size} tokens")
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _bytes(self, id: int) -> bytes:
        name = self.name(id)
        if id in self._added:
            return name.encode()
        if self._byte_level:
            return bytes(map(_BYTE_OF.__getitem__, name)) if set(name) <= _BYTE_OF.keys() else b""
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        return name.replace(_SPACE_SIGN, " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        """Whether the vocabulary is of bytes written as characters (GPT-2's way)."""
        return "ByteLevel" in repr(self._tokenizer.decoder)


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's table (`bytes_to_unicode`): printable bytes as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of_characters()
