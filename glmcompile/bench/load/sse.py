"""Server-sent events out of the pieces in which a stream happens to arrive."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\r|\n")


class EventDecoder:
    """Decodes a stream as the WHATWG HTML standard says (section 9.2.6).

    Only what a chat completion uses is kept, the data; comments and other fields are passed over.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._skip_newline = False  # the last piece ended in \r, whose \n may come with the next
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that `piece` completes; a piece may end anywhere."""
        if not piece:
            return []
        if self._skip_newline and piece.startswith(b"\n"):
            piece = piece[1:]
        self._skip_newline = piece.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                    self._data = []
                continue
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
        return events
