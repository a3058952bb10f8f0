"""Requests to token ids: chat template, image placeholders, tokenizer; as transformers does it.

Template rules: `render_jinja_template` of transformers' `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from glmcompile.artifact import CHAT_TEMPLATE, TOKENIZER
from glmcompile.errors import ArtifactError, InputError
from glmcompile.families import Family
from glmcompile.runtime.detokenizer import Detokenizer, special_ids

Message = Mapping[str, Any]

_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_IMAGE_SOURCES = ("image", "url", "path", "base64")


class PromptBuilder:
    """The tokenizer and chat template of one model directory (an engine or a checkpoint)."""

    def __init__(self, directory: Path, family: Family) -> None:
        """Raises ArtifactError when tokenizer or template are missing or damaged."""
        self._family = family
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(
                f"{directory / TOKENIZER}: not a tokenizer ({error}); fetch it again"
            ) from error
        # The file may hold settings for training batches; a prompt is neither cut nor padded.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._special_ids = special_ids(self.tokenizer)
        self._special_tokens, source = _settings(directory / "tokenizer_config.json")
        file = directory / CHAT_TEMPLATE
        try:
            source = file.read_text("utf-8") if file.is_file() else source
            self._template = _environment().from_string(source) if source else None
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{file}: not UTF-8 text ({error}); fetch it again") from error
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(
                f"{directory}: the chat template is not valid Jinja ({error}, line {error.lineno})"
            ) from error

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat as text, one placeholder per image; equal to transformers' apply_chat_template.

        messages: from `split_images`, or in the template's own form.
        variables: further names for the template (`enable_thinking=False`).
        Raises InputError when there is no template, or the template rejects the messages.
        """
        if self._template is None:
            raise InputError(
                "this model has no chat template; give the whole prompt as `text` instead"
            )
        try:
            return self._template.render(
                messages=[_with_reasoning_names(_plain(dict(message))) for message in messages],
                tools=_plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **_plain(variables)},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template rejects the messages: {error}") from error

    def split_images(
        self, messages: Sequence[Message], images: Sequence[Any] = ()
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages in the templates' form, and the images they show in order.

        Image parts are `{"type": "image"}` with the image under image, url, path or base64, or
        OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, or bare; bare ones take the
        next of `images`. A text model's parts are joined by newlines, since its
        template wants a string.
        Raises InputError for malformed messages, bare parts without an image, and images left over.
        """
        if not messages:
            raise InputError("messages is empty; give at least one message")
        given = iter(images)
        sources: list[Any] = []
        result: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"messages[{index}]: expected a mapping with `role` and `content`")
            # Many templates print a `None` they are handed; a missing key they handle.
            kept = {key: value for key, value in message.items() if value is not None}
            content = kept.get("content")
            if isinstance(content, list | tuple):
                parts: list[Any] = []
                for place, part in enumerate(content):
                    where = f"messages[{index}].content[{place}]"
                    parts.append(self._part(part, where, given, sources))
                if self._family.image_placeholder is None:
                    kept["content"] = "\n".join(part["text"] for part in parts)
                else:
                    kept["content"] = parts
            elif content is not None and not isinstance(content, str):
                raise InputError(f"messages[{index}].content: expected a string or a list of parts")
            result.append(kept)
        left = len(list(given))
        if left:
            raise InputError(
                f"{left} of {len(images)} images have no place in the messages; add a "
                '{"type": "image"} part for each'
            )
        return result, sources

    def user_message(self, prompt: str, images: Sequence[Any] = ()) -> dict[str, Any]:
        """One user turn: the images, then the text."""
        if not images:
            return {"role": "user", "content": prompt}
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}

    def expand(self, text: str, image_tokens: Sequence[int]) -> str:
        """Repeat each image placeholder, one per image token (Family.expand_placeholders)."""
        return self._family.expand_placeholders(text, image_tokens)

    def encode(self, text: str, *, from_template: bool) -> list[int]:
        """Token ids of an expanded prompt.

        Special tokens (a BOS) are added where transformers adds them: never to a text model's
        rendered chat, and otherwise unless the text begins with the BOS already.
        """
        bos = self._special_tokens.get("bos_token")
        bare = from_template and (
            self._family.image_placeholder is None or (bos is not None and text.startswith(bos))
        )
        return self.tokenizer.encode(text, add_special_tokens=not bare).ids

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Turns one answer's tokens back into text."""
        return Detokenizer(self.tokenizer, self._special_ids, stop)

    def _part(self, part: Any, where: str, given: Any, sources: list[Any]) -> dict[str, Any]:
        """One content part in the template's form; its image goes to `sources`."""
        if not isinstance(part, Mapping) or "type" not in part:
            raise InputError(f"{where}: expected a mapping with `type`")
        if part["type"] == "text":
            if not isinstance(part.get("text"), str):
                raise InputError(f"{where}: expected `text` to be a string")
            return dict(part)
        if part["type"] not in ("image", "image_url"):
            raise InputError(f"{where}: type {part['type']!r} is not supported; use text or image")
        if self._family.image_placeholder is None:
            raise InputError(f"{where}: a {self._family.name} model takes text only, not images")
        shown = dict(part)
        if part["type"] == "image_url":
            url = part.get("image_url")
            source = url.get("url") if isinstance(url, Mapping) else url
            if not source:
                raise InputError(f"{where}: expected image_url to be a URL or {{'url': ...}}")
            shown = {"type": "image", "url": source}
        else:
            source = next((part[key] for key in _IMAGE_SOURCES if part.get(key) is not None), None)
            if part.get("base64") is source and isinstance(source, str):
                source = f"data:image/*;base64,{source}"
            if source is None:
                source = next(given, None)
            if source is None:
                raise InputError(f"{where}: an image part without an image, and none is left")
        sources.append(source)
        return shown


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


def _plain(value: Any) -> Any:
    """Only JSON's types reach the template: methods of richer objects could do harm there."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return f"<{type(value).__name__}>"


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
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
