"""The form that an answer must have, as data: JSON schemas, patterns, choices, grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from glmcompile.errors import InputError

# Bytes of a grammar's source by kind; more is refused before any of it is read.
_MAX_BYTES = {
    "json_schema": 64 << 10,
    "regex": 8 << 10,
    "choice": 64 << 10,
    "ebnf": 16 << 10,
    "lark": 512 << 10,
}
MAX_CHOICES = 1000
# The automaton for multiples of n has n states, and no limit of the compiler's stops it.
MAX_MULTIPLE = 10_000
# One space, or a line break and its indentation: a model in doubt else writes blanks for ever.
_WHITESPACE = r"[ ]|\n[ \t]{0,64}"


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, as data that can be compared and hashed; made by the class methods.

    kind, source: "json_schema" with the schema as JSON, "regex" with the pattern, "choice" with the
        choices as JSON, "ebnf" with a client's grammar, "lark" with one made by Grammar.lark.
    after: free text comes first, up to and with this marker (the end of a thinking block).
    opened_by: that text is optional and begins with this marker; None: it is open from the start.
    Raises InputError for sources that are too large.
    """

    kind: str
    source: str
    after: str | None = None
    opened_by: str | None = None

    def __post_init__(self) -> None:
        limit = _MAX_BYTES.get(self.kind)
        if limit is None:
            raise InputError(f"no kind of grammar {self.kind!r}; there are {', '.join(_MAX_BYTES)}")
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > limit:
            raise InputError(f"the {self.kind} has {size} bytes; at most {limit} are allowed")

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Any, *, compact: bool = False) -> Grammar:
        """JSON that is valid by a schema, given as a mapping or as JSON text.

        Separators may be followed by a space or a line break; compact: by nothing.
        """
        return cls("json_schema", schema_source(schema, compact=compact))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that the pattern matches as a whole (Rust's regex syntax, without look-around)."""
        if not isinstance(pattern, str):
            raise InputError(f"regex is {pattern!r}; expected a pattern as a string")
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """Exactly one of these strings."""
        sound = isinstance(choices, Sequence) and not isinstance(choices, str) and choices
        if not sound or not all(isinstance(choice, str) and choice for choice in choices):
            raise InputError(f"choice is {choices!r}; expected strings that are not empty")
        if len(choices) > MAX_CHOICES:
            raise InputError(f"choice has {len(choices)} strings; at most {MAX_CHOICES} fit")
        return cls("choice", json.dumps(list(dict.fromkeys(choices))))

    @classmethod
    def ebnf(cls, text: str) -> Grammar:
        """A grammar in GBNF (llama.cpp) or Lark form."""
        if not isinstance(text, str):
            raise InputError(f"grammar is {text!r}; expected its text as a string")
        return cls("ebnf", text)

    @classmethod
    def lark(cls, text: str, schemas: Mapping[str, str]) -> Grammar:
        """A grammar of our own in llguidance's Lark form; of a client's text it holds literals.

        A literal that is the whole text of a special token (or of another added one such as
        "<think>") stands for that token, `until("x")` for any text up to and with x, and @name for
        JSON by one of `schemas` (from schema_source).
        """
        return cls("lark", json.dumps({"text": text, "schemas": dict(schemas)}))


def schema_source(schema: Any, *, compact: bool = False) -> str:
    """A schema as JSON text for the compiler. Raises InputError for one that is no schema."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the JSON schema is not JSON: {error}") from error
    schema = {} if schema is True else json.loads(text)
    if not isinstance(schema, Mapping):
        raise InputError(f"the JSON schema is {text[:80]}; expected an object")
    _check_multiples(schema)
    spacing = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITESPACE}
    return json.dumps({**schema, "x-guidance": {**spacing, "lenient": False}})


def _check_multiples(schema: Any) -> None:
    for part in schema.values() if isinstance(schema, Mapping) else schema:
        if isinstance(part, Mapping | list):
            _check_multiples(part)
    step = schema.get("multipleOf") if isinstance(schema, Mapping) else None
    if isinstance(step, int | float):
        digits = int("".join(map(str, Decimal(str(step)).normalize().as_tuple().digits)))
        if max(digits, abs(step)) > MAX_MULTIPLE:
            raise InputError(f"multipleOf is {step}; up to {MAX_MULTIPLE} are supported")
