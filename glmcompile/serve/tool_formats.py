"""How models write tool calls: one table of formats, each read back and described as a grammar."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glmcompile.runtime.grammar import schema_source

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A call as OpenAI's protocol gives it. arguments: a JSON object as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call.

    signs: what a chat template that describes this format says; absent: what it does not say.
    begin, end: markers around a call; without an end, the answer as a whole is the call, which
        may begin with the marker.
    markers: what must reach the text, so that special tokens among it are not to be skipped.
    read: what stands between the markers, and the tools' parameters by name, to the calls; raises
        ValueError for what is none.
    lark: a tool's name, its parameters and a prefix for names to a Lark expression of what stands
        between the markers, and the schemas that it refers to.
    """

    signs: tuple[str, ...]
    absent: tuple[str, ...]
    begin: str
    end: str | None
    markers: tuple[str, ...]
    read: Callable[[str, Mapping[str, Schema]], list[ToolCall]]
    lark: Callable[[str, Schema, str], tuple[str, dict[str, str]]]


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template describes; None for one that describes none of these."""
    for format in _FORMATS:
        described = all(sign in template for sign in format.signs)
        if described and not any(sign in template for sign in format.absent):
            return format
    return None


def _read_json(text: str, tools: Mapping[str, Schema]) -> list[ToolCall]:
    """JSON objects of a name and arguments, as Llama writes them with a semicolon between."""
    calls, place = [], 0
    while text[place:].strip(" \t\r\n;"):
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n;"))
        try:
            call, place = _STRICT.raw_decode(text, place)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError("a call is an object with a name")
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _STRICT.decode(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        calls.append(ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False)))
    if not calls:
        raise ValueError("no call")
    return calls


def _read_tagged(text: str, tools: Mapping[str, Schema]) -> list[ToolCall]:
    """A name, then keys and values in tags; a string parameter's value is its bare text."""
    found = _NAME.match(text)
    if found is None:
        raise ValueError("a call begins with a name")
    name, place = found[1], found.end()
    properties = tools.get(name, {}).get("properties", {})
    arguments = {}
    while place < len(text):
        argument = _ARGUMENT.match(text, place)
        if argument is None:
            raise ValueError("expected a key and a value in their tags")
        key, value = argument[1].strip(), argument[2]
        arguments[key] = value if _is_string(properties.get(key)) else _value(value)
        place = argument.end()
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False))]


def _value(text: str) -> Any:
    try:
        return _STRICT.decode(text.strip())
    except (ValueError, RecursionError):
        return text


def _json_lark(arguments: str) -> Callable[[str, Schema, str], tuple[str, dict[str, str]]]:
    def lark(name: str, parameters: Schema, prefix: str) -> tuple[str, dict[str, str]]:
        start = literal(f'{{"name": {json.dumps(name)}, "{arguments}": ')
        return f'{start} @{prefix} "}}"', {prefix: schema_source(parameters)}

    return lark


def _line_of_json_lark(name: str, parameters: Schema, prefix: str) -> tuple[str, dict[str, str]]:
    expression, schemas = _json_lark("arguments")(name, parameters, prefix)
    return f'"\\n" {expression} "\\n"', schemas


def _tagged_lark(name: str, parameters: Schema, prefix: str) -> tuple[str, dict[str, str]]:
    properties = parameters.get("properties") or {}
    required = parameters.get("required") or ()
    definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    schemas: dict[str, str] = {}
    expression = literal(f"{name}\n")
    for index, (key, schema) in enumerate(properties.items()):
        if _is_string(schema):
            choices = [schema["const"]] if "const" in schema else schema.get("enum")
            value = 'until("</arg_value>")'
            if choices:
                value = f'({" | ".join(map(literal, choices))}) "</arg_value>"'
        else:
            schemas[f"{prefix}_{index}"] = schema_source({**definitions, **schema})
            value = f'@{prefix}_{index} "</arg_value>"'
        argument = f'"<arg_key>" {literal(key)} "</arg_key>" "\\n" "<arg_value>" {value} "\\n"'
        expression += f" {argument}" if key in required else f" ({argument})?"
    return expression, schemas


def literal(text: str) -> str:
    """A Lark literal of text that is not ours, which therefore stands for no special token."""
    return (
        '"' + "".join(c if c.isalnum() or ord(c) > 127 else f"\\u{ord(c):04x}" for c in text) + '"'
    )


def _is_string(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_no_constant)
_NAME = re.compile(r"\s*([^\s<>{}]+)\s*")
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_CALL = ("<tool_call>", "</tool_call>")
_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

_FORMATS = (
    # GLM-4.5 and later.
    ToolFormat(("<arg_key>",), (), *_CALL, (*_CALL, *_TAGS), _read_tagged, _tagged_lark),
    # Hermes, and Qwen after it; Qwen's coder models have another one behind the same markers.
    ToolFormat(
        ("<tool_call>", "arguments"), ("<function=",), *_CALL, _CALL, _read_json, _line_of_json_lark
    ),
    # Llama 3.1 and later.
    ToolFormat(
        ('"parameters', "dictionary of argument name"),
        (),
        "<|python_tag|>",
        None,
        ("<|python_tag|>",),
        _read_json,
        _json_lark("parameters"),
    ),
)
