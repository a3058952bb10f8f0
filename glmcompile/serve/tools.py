"""Tool calls of one answer: `tool_choice` as a grammar, and calls read from text as it streams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.serve.reasoning import held_back
from glmcompile.serve.tool_formats import Schema, ToolCall, ToolFormat

# As requests have them: {"type": "function", "function": {"name", "description", "parameters"}}.
Tool = Mapping[str, Any]
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    format: ToolFormat | None, tools: Sequence[Tool], choice: Any, *, parallel: bool = True
) -> Grammar | None:
    """What `tool_choice` asks of the answer; None for "auto" and "none".

    parallel: allow more than one call, where the format has a place for them.
    Raises InputError for a choice that is malformed or cannot be met.
    """
    functions = tool_parameters(tools)
    if choice in (None, "auto", "none"):
        return None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        chosen = choice.get("function", choice)
        name = chosen.get("name") if isinstance(chosen, Mapping) else None
        if name not in functions:
            raise InputError(f"tool_choice names {name!r}; tools has {', '.join(functions)}")
        functions, parallel = {name: functions[name]}, False
    elif choice != "required":
        raise InputError(
            f"tool_choice is {choice!r}; expected none, auto, required or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if not functions:
        raise InputError("tool_choice is required, and there are no tools")
    if format is None:
        raise InputError("tool_choice: this model's chat template describes no known tool format")
    rules, schemas = [], {}
    for index, (name, parameters) in enumerate(functions.items()):
        expression, used = format.lark(name, parameters, f"f{index}_arguments")
        rules.append(f"f{index}: {expression}")
        schemas.update(used)
    call = " | ".join(f"f{index}" for index in range(len(functions)))
    if format.end is None:
        return Grammar.lark("\n".join([f"start: {call}", *rules]), schemas)
    marked = f"call: {json.dumps(format.begin)} ({call}) {json.dumps(format.end)}"
    start = 'start: call ("\\n" call)*' if parallel else "start: call"
    return Grammar.lark("\n".join([start, marked, *rules]), schemas)


def tool_parameters(tools: Sequence[Tool]) -> dict[str, Schema]:
    """The schemas of the tools' parameters by name. Raises InputError for malformed tools."""
    parameters: dict[str, Schema] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise InputError(f"tools[{index}]: expected a function with a name")
        schema = function.get("parameters") or _NO_PARAMETERS
        if not isinstance(schema, Mapping):
            raise InputError(f"tools[{index}]: expected `parameters` to be a JSON schema")
        parameters[name] = schema
    return parameters


class ToolParser:
    """Splits one answer into content and tool calls, however its text is cut into pieces.

    A call is given out when it is complete; white space next to one is dropped. What turns out not
    to be a call is content, to the last character.
    """

    def __init__(self, format: ToolFormat, tools: Sequence[Tool]) -> None:
        self._format = format
        self._parameters = tool_parameters(tools)
        self._text = ""  # not given out yet
        self._trims = False  # drop white space at the beginning of what follows
        self._is_content = False  # the answer as a whole, where the format has no end marker

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take a piece of the answer; returns what it adds to (content, calls)."""
        self._text += text
        if self._format.end is not None:
            return self._marked(self._format.end)
        words = self._text.lstrip()
        begins = words.startswith(("{", self._format.begin)) or self._format.begin.startswith(words)
        if begins and not self._is_content:
            return "", []
        self._is_content = True
        content, self._text = self._text, ""
        return content, []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Returns what was held back. A last call may lack its end marker."""
        text, self._text = self._text, ""
        words = text.strip()
        if words.startswith(self._format.begin) or self._format.end is None:
            try:
                return "", self._read(words.removeprefix(self._format.begin))
            except ValueError:
                pass
        return text, []

    def _marked(self, end: str) -> tuple[str, list[ToolCall]]:
        content: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._trims:
                self._text = self._text.lstrip()
                self._trims = not self._text
            before, begin, body = self._text.partition(self._format.begin)
            kept = (
                before[len(before.rstrip()) :] if begin else held_back(before, self._format.begin)
            )
            content.append(before.removesuffix(kept))
            self._text = kept + begin + body
            if not begin:
                return "".join(content), calls
            found, length = self._first_call(body, end)
            if not length:
                return "".join(content), calls
            length += len(self._text) - len(body)
            if found:
                calls += found
                self._trims = True
            else:
                content.append(self._text[:length])
            self._text = self._text[length:]

    def _first_call(self, body: str, end: str) -> tuple[list[ToolCall], int]:
        """The calls before the end marker, none if malformed, and its place; 0 while it is open."""
        place = body.find(end)
        while place >= 0:
            try:
                return self._read(body[:place]), place + len(end)
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Unterminated string"):  # the marker is in a string
                    return [], place + len(end)
            except ValueError:
                return [], place + len(end)
            place = body.find(end, place + 1)
        return [], 0

    def _read(self, body: str) -> list[ToolCall]:
        return self._format.read(body, self._parameters)
