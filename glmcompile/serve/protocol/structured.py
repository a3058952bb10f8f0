"""The form that an answer must have: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.serve.protocol.common import Body


class NamedSchema(Body):
    """name, description and strict change nothing: an answer follows its schema always."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchema(NamedSchema):
    """A schema under a field of its own."""

    json_schema: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Body):
    """`response_format` of chat completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`json_schema` belongs to the type json_schema, which needs it")
        return self

    def grammar(self) -> Grammar | None:
        """Raises InputError for a schema that is none."""
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema.json_schema)
        return Grammar.json_object() if self.type == "json_object" else None


class TextFormat(NamedSchema):
    """`text.format` of responses: the same, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _consistent(self) -> TextFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`schema` belongs to the type json_schema, which needs it")
        return self

    def grammar(self) -> Grammar | None:
        """Raises InputError for a schema that is none."""
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema)
        return Grammar.json_object() if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`; exactly one of its fields."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "structural_tag": ((), "use `tools`, or a `grammar`"),
        "whitespace_pattern": ((), "a space or a line break may follow each separator"),
        "disable_any_whitespace": ((False,), "a space or a line break may follow each separator"),
        "disable_fallback": ((True, False), "there is nothing to fall back to"),
        "disable_additional_properties": ((False,), "say so in the schema"),
    }

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    def to_grammar(self) -> Grammar:
        """Raises InputError for what no grammar can be made of."""
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        return Grammar.json_object() if self.grammar is None else Grammar.ebnf(self.grammar)


def one_grammar(*grammars: Grammar | None) -> Grammar | None:
    """The one that is given. Raises InputError for more: an answer has one form."""
    given = [grammar for grammar in grammars if grammar is not None]
    if len(given) > 1:
        raise InputError(
            "response_format, structured_outputs and a tool_choice that requires a call "
            "exclude each other; give one of them"
        )
    return given[0] if given else None
