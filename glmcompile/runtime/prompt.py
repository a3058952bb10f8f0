"""Requests to token ids: chat template, image placeholders, tokenizer; as transformers does it.

Who wrote a string decides what its control tokens are: a template's are tokens, and so are those of
an assistant's turn (the model's own words) and of a whole prompt that its caller formatted. In
anybody else's words they are text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from glmcompile.artifact import TOKENIZER
from glmcompile.errors import ArtifactError, InputError
from glmcompile.runtime.chat_template import ChatTemplate, checked_text, json_data
from glmcompile.runtime.control_tokens import ControlTokens, PromptText
from glmcompile.runtime.detokenizer import Detokenizer, special_ids
from glmcompile.runtime.media import ImageSource

Message = Mapping[str, Any]

# Some templates make a control token of a role, and most leave out turns of a role they don't know.
ROLES = (
    "system", "developer", "user", "assistant", "tool", "function", "observation", "ipython",
)  # fmt: skip

_IMAGE_SOURCES = ("image", "url", "path", "base64")


class PromptBuilder:
    """The tokenizer and chat template of one model directory (an engine or a checkpoint)."""

    def __init__(self, directory: Path, image_placeholder: str | None) -> None:
        """image_placeholder: the text of one image in a rendered prompt; None for a text model.

        Raises ArtifactError when tokenizer or template are missing or damaged.
        """
        self._placeholder = image_placeholder
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
        self._controls = ControlTokens(self.tokenizer, image_placeholder)
        self._template = ChatTemplate(directory)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template)

    @property
    def chat_template(self) -> str:
        """The template's text; "" without one."""
        return self._template.source

    def render(self, messages: Sequence[Message], **arguments: Any) -> str:
        """The chat as text, as transformers' apply_chat_template; arguments as for `chat`."""
        return self.chat(messages, **arguments).text

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> PromptText:
        """The chat with one placeholder per image; its text equals apply_chat_template's.

        messages: from `split_images`.
        tools: definitions as JSON.
        options: further names for the template (`enable_thinking=False`).
        Raises InputError when there is no template, the template rejects the messages, or they
        hold what is no JSON.
        """
        self._template.check_options({} if options is None else options)
        if tools is not None:
            _check_tools(tools)
        as_text = self._controls.as_text
        plain = [json_data(message, f"messages[{i}]") for i, message in enumerate(messages)]
        tools = None if tools is None else _with_text(json_data(tools, "tools"), as_text, as_text)
        options = _with_text(json_data(options or {}, "template_options"), as_text, as_text)

        def written(text: Callable[[str], str]) -> PromptText:
            chat = [self._marked(message, text) for message in plain]
            marked = self._template.render(chat, tools, add_generation_prompt, options)
            return self._controls.read(marked, from_template=True)

        prompt = written(as_text)
        # Two strings, or a string and the template, can make a token together. What the template
        # writes around strings without any letter of a token shows whether that happened.
        masked = written(self._controls.masked)
        return prompt if prompt.tokens() == masked.tokens() else masked

    def whole(self, text: str) -> PromptText:
        """A whole prompt that its caller formatted: control tokens in it are tokens."""
        text = checked_text(text, "text")
        return PromptText(text, self._controls.find(text))

    def turn(self, prompt: str, images: int) -> PromptText:
        """Images, then a user's words, for a model that has no chat template."""
        marks = (self._placeholder or "") * images
        return self._controls.read(marks + self._controls.as_text(checked_text(prompt, "prompt")))

    def split_images(
        self, messages: Sequence[Message], images: Sequence[Any] = ()
    ) -> tuple[list[dict[str, Any]], list[ImageSource]]:
        """Messages in the templates' form, and the images they show in order.

        Image parts are `{"type": "image"}` with the image under image, url, path or base64, or
        OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, or bare; bare ones take the
        next of `images`. A text model's parts are joined by newlines, since its
        template wants a string.
        Raises InputError for malformed messages, bare parts without an image, and images left over.
        """
        if not isinstance(messages, list | tuple):
            raise InputError(f"messages: expected a list, not {type(messages).__name__}")
        if not messages:
            raise InputError("messages is empty; give at least one message")
        given = iter([_named(image, f"images[{i}]") for i, image in enumerate(images)])
        sources: list[ImageSource] = []
        result: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"{where}: expected a mapping with `role` and `content`")
            if message["role"] not in ROLES:
                raise InputError(
                    f"{where}: unknown role {message['role'][:40]!r}; use one of {', '.join(ROLES)}"
                )
            # Many templates print a `None` they are handed; a missing key they handle.
            kept = {key: value for key, value in message.items() if value is not None}
            content = kept.get("content")
            if isinstance(content, list | tuple):
                parts = [
                    self._part(part, f"{where}.content[{place}]", given, sources)
                    for place, part in enumerate(content)
                ]
                if self._placeholder is None:
                    kept["content"] = "\n".join(part["text"] for part in parts)
                else:
                    kept["content"] = parts
            elif not isinstance(content, str) and (
                content is not None or message["role"] != "assistant"
            ):
                raise InputError(f"{where}.content: expected a string or a list of parts")
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

    def encode(self, prompt: PromptText, image_tokens: Sequence[Sequence[int]] = ()) -> list[int]:
        """Token ids of a prompt, each image placeholder replaced by the tokens of its image.

        Special tokens (a BOS) are added where transformers adds them: never to a text model's
        rendered chat, and otherwise unless the text begins with the BOS already.
        Raises InputError when the prompt has more or fewer placeholders than there are images.
        """
        bos = self._template.special_tokens.get("bos_token")
        begins = bos is not None and prompt.text.startswith(bos) and bos in prompt.tokens()[:1]
        bare = prompt.from_template and (self._placeholder is None or begins)
        return self._controls.encode(prompt, image_tokens, add_special_tokens=not bare)

    def detokenizer(self, stop: Sequence[str] = (), shown: Collection[str] = ()) -> Detokenizer:
        """Turns one answer's tokens back into text; of special tokens those in `shown` alone."""
        skipped = self._special_ids - {self.tokenizer.token_to_id(token) for token in shown}
        return Detokenizer(self.tokenizer, skipped, stop)

    def _marked(self, message: dict[str, Any], text: Callable[[str], str]) -> dict[str, Any]:
        """A message whose strings can name no control token, but an assistant's those it emits."""
        role = message["role"]
        if role == "developer" and role not in self._template.source:
            role = "system"  # OpenAI's newer name, which most templates leave out silently
        names = self._controls.as_text
        if role == "assistant":  # no model emits images
            text = names = self._controls.without_images
        return _with_text(message, text, names) | {"role": role}

    def _part(
        self, part: Any, where: str, given: Any, sources: list[ImageSource]
    ) -> dict[str, Any]:
        """One content part in the template's form; its image goes to `sources`.

        Only what is known of a part is kept: templates look for `image` or `video` in any part.
        """
        if not isinstance(part, Mapping) or "type" not in part:
            raise InputError(f"{where}: expected a mapping with `type`")
        if part["type"] == "text":
            if not isinstance(part.get("text"), str):
                raise InputError(f"{where}: expected `text` to be a string")
            return {"type": "text", "text": part["text"]}
        if part["type"] not in ("image", "image_url"):
            raise InputError(
                f"{where}: type {str(part['type'])[:40]!r} is not supported; use text or image"
            )
        if self._placeholder is None:
            raise InputError(f"{where}: this model takes text only, not images")
        if part["type"] == "image_url":
            url = part.get("image_url")
            source = url.get("url") if isinstance(url, Mapping) else url
            if not source:
                raise InputError(f"{where}: expected image_url to be a URL or {{'url': ...}}")
        else:
            source = next((part[key] for key in _IMAGE_SOURCES if part.get(key) is not None), None)
            if part.get("base64") is source and isinstance(source, str):
                source = f"data:image/*;base64,{source}"
            if source is None:
                source = next(given, None)
            if source is None:
                raise InputError(f"{where}: an image part without an image, and none is left")
        sources.append(_named(source, where))
        return {"type": "image"}


def _named(image: Any, where: str) -> ImageSource:
    """An image with its place in the request, unless it has one already."""
    return image if isinstance(image, ImageSource) else ImageSource(image, where)


def _check_tools(tools: Any) -> None:
    """Raises InputError for anything but a list of mappings; what is in them is the template's."""
    if not isinstance(tools, list | tuple):
        raise InputError(f"tools: expected a list of definitions, not {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InputError(f"tools[{index}]: expected a mapping, not {type(tool).__name__}")


def _with_text(value: Any, text: Callable[[str], str], key: Callable[[str], str]) -> Any:
    """JSON data with its strings and its keys put through functions; a `type` is like a key."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        return [_with_text(item, text, key) for item in value]
    if isinstance(value, dict):
        return {
            key(name): _with_text(item, key if name == "type" else text, key)
            for name, item in value.items()
        }
    return value
