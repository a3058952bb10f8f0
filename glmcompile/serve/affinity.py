"""Which replica a request goes to: the one that has its conversation's beginning, within reason."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

# Of a prompt without turns; as much as a system prompt usually has.
_BEGINNING = 2048
# A replica may have this much more than its share of what runs ("Consistent Hashing with Bounded
# Loads", Mirrokni, Thorup and Zadimoghaddam 2018).
_MOST_OVER_SHARE = 1.25


def conversation_key(body: bytes) -> bytes | None:
    """A digest of how a request's conversation begins; None for what computes nothing or is wrong.

    That is everything up to the first user turn, whose images count only if it has no text: an
    agent leaves out its earlier screenshots, and would be another conversation from then on.
    """
    try:
        request = from_json(body)
    except ValueError:
        return None
    if not isinstance(request, Mapping):
        return None
    beginning = _beginning(request)
    if not beginning:
        return None
    return hashlib.sha256("\x00".join(beginning).encode(errors="surrogatepass")).digest()


def preference(key: bytes, replicas: int) -> list[int]:
    """Replicas by rendezvous hashing: one that is away changes the place of its own keys alone."""
    weights = [hashlib.sha256(key + place.to_bytes(4)).digest() for place in range(replicas)]
    return sorted(range(replicas), key=weights.__getitem__)


def order(key: bytes | None, loads: Sequence[int]) -> list[int]:
    """Replicas in the order in which a request tries them.

    loads: requests at each. The key's own replica comes first unless it has more than its share;
    those that do come last, and without a key the least loaded comes first.
    """
    if key is None:
        return sorted(range(len(loads)), key=loads.__getitem__)
    share = math.ceil(_MOST_OVER_SHARE * (sum(loads) + 1) / len(loads))
    return sorted(preference(key, len(loads)), key=lambda place: loads[place] >= share)


def _beginning(request: Mapping[str, Any]) -> list[str]:
    """The texts that the key is made of, from any of the routes' bodies."""
    match request:
        case {"messages": [*turns]} | {"input": [*turns]}:
            return [*_instructions(request), *_turns(turns)]
        case {"input": str(text)}:
            return [*_instructions(request), text]
        case {"prompt": str(text)} | {"inputs": {"text": str(text)}}:
            return [text[:_BEGINNING]]
        case {"prompt": [*ids]}:
            return [repr(ids[:_BEGINNING])]
    return []


def _instructions(request: Mapping[str, Any]) -> list[str]:
    return [str(request["instructions"])] if "instructions" in request else []


def _turns(turns: Sequence[Any]) -> list[str]:
    texts: list[str] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            return []
        texts += [str(turn.get("role")), *_content(turn.get("content"))]
        if turn.get("role") == "user":
            break
    return texts


def _content(content: Any) -> list[str]:
    if not isinstance(content, list):
        return [str(content)]
    texts = [part["text"] for part in content if _has_text(part)]
    return texts or [str(part) for part in content]


def _has_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
