"""A model's chat template: its Jinja environment, and what data may enter it.

Template rules: `render_jinja_template` of transformers' `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmcompile.artifact import CHAT_TEMPLATE
from glmcompile.errors import ArtifactError, InputError

MAX_DEPTH = 64  # of lists and mappings in messages and tools; JSON schemas stay far below

_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatTemplate:
    """The template of one model directory, from a file of its own or the tokenizer's settings."""

    def __init__(self, directory: Path) -> None:
        """Raises ArtifactError when a file is damaged; a model may have no template."""
        self.special_tokens, source = _settings(directory / "tokenizer_config.json")
        file = directory / CHAT_TEMPLATE
        environment = _environment()
        try:
            source = file.read_text("utf-8") if file.is_file() else source
            self._template = environment.from_string(source) if source else None
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{file}: not UTF-8 text ({error}); fetch it again") from error
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(
                f"{directory}: the chat template is not valid Jinja ({error}, line {error.lineno})"
            ) from error
        self.source = source or ""
        self._reserved = {
            *_ARGUMENTS,
            *(f"{name}_token" for name in _NAMED_TOKENS),
            *environment.globals,
        }

    def __bool__(self) -> bool:
        """Whether the model has a template."""
        return self._template is not None

    def check_options(self, options: Any) -> None:
        """Raises InputError for an option that would replace what the template relies on."""
        if not isinstance(options, Mapping):
            raise InputError(f"template_options: expected a mapping, not {type(options).__name__}")
        for name in options:
            if name in self._reserved:
                raise InputError(
                    f"template option {name!r:.40} is reserved; options are further names of the "
                    "chat template, such as enable_thinking"
                )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any],
    ) -> str:
        """The chat as text. All data must be JSON's (`json_data`).

        Raises InputError when there is no template, or the template rejects the messages.
        """
        if self._template is None:
            raise InputError(
                "this model has no chat template; give the whole prompt as `text` instead"
            )
        names = {
            **self.special_tokens,
            **options,
            "messages": [_with_reasoning_names(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except Exception as error:  # whatever a foreign program meets in foreign data
            raise InputError(f"the chat template rejects the messages: {error}") from error


def json_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's own types, all that templates get: richer objects have methods.

    Raises InputError naming the place of what is no JSON, too deeply nested, or no Unicode text.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked_text(value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{where}: {value} is no JSON number")
        return float(value)
    if isinstance(value, Mapping):
        made = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: the key {key!r} is no string")
            made[checked_text(key, where)] = json_data(item, f"{where}.{key[:40]}", depth + 1)
        return made
    if isinstance(value, list | tuple):
        return [json_data(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise InputError(f"{where}: a {type(value).__name__} object is no JSON value")


def checked_text(text: Any, where: str) -> str:
    """A plain str. Raises InputError for other things, and for lone surrogates (broken UTF-16)."""
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, not a {type(text).__name__} object")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise InputError(
            f"{where}: character {found.start()} is the lone surrogate {found[0]!r}, half of a "
            "UTF-16 pair; was the text cut inside a character?"
        )
    return str.__str__(text)


def _settings(file: Path) -> tuple[dict[str, str], str | None]:
    """The special tokens by the names templates use, and the chat template, where there are any."""
    if not file.is_file():
        return {}, None
    try:
        settings = json.loads(file.read_text("utf-8"))
        tokens = {
            f"{name}_token": _token_text(token)
            for name in _NAMED_TOKENS
            if (token := settings.get(f"{name}_token")) is not None
        }
        template = settings.get("chat_template")
        if isinstance(template, list):  # transformers 4 stored several templates by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file}: not a tokenizer's settings ({error!r}); fetch it again"
        ) from error
    return tokens, template


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _with_reasoning_names(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reasoning goes by several names; templates read the first, gpt-oss the second."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
