"""What an answer must look like: a grammar, and the tokens it allows and forces (llguidance)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, as data that can be compared and hashed.

    kind: "json_object", "json_schema", "regex", "choice" or "ebnf".
    source: the schema or list of choices as JSON, the pattern, the grammar's text.
    after: text that the answer begins with before the form applies, up to and with this marker.
    """

    kind: str
    source: str = ""
    after: str | None = None
