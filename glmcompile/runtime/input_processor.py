"""A caller's request to what the decoder takes: token ids, image spans, positions, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ModelConfig
from glmcompile.errors import InputError
from glmcompile.families import Family
from glmcompile.runtime.image_processor import ImageProcessor, ProcessedImage
from glmcompile.runtime.prompt import Message, PromptBuilder
from glmcompile.runtime.sequence import ImageSpan


@dataclass(frozen=True)
class Prompt:
    """What a caller may give; exactly one of the first four.

    prompt: a user's turn; goes through the chat template where the model has one.
    messages: a chat, in Hugging Face's or OpenAI's form.
    text: the whole prompt as text, with one placeholder per image.
    token_ids: the whole prompt as tokens, with one image token per image feature.
    images: shown by `prompt` before its text, by the others at their bare placeholders, in order.
    tools, template_options: further names for the chat template.
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    text: str | None = None
    token_ids: Sequence[int] | None = None
    images: Sequence[Any] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PreparedPrompt:
    """positions: int64 [axes, tokens]; token i after the prompt is at i + position_offset."""

    token_ids: list[int]
    images: tuple[ImageSpan, ...]
    positions: NDArray[np.int64]
    position_offset: int


class InputProcessor:
    """Tokenizer, chat template and image processor of one model directory; safe from any thread."""

    def __init__(self, directory: Path, family: Family, model: ModelConfig) -> None:
        self.prompts = PromptBuilder(directory, family)
        self._family = family
        self._model = model
        self._images = ImageProcessor(family, model.vision) if model.vision is not None else None

    def __call__(self, request: Prompt) -> PreparedPrompt:
        """Raises InputError naming what cannot be served: an image, a message, the length."""
        given = [request.prompt, request.messages, request.text, request.token_ids]
        if sum(item is not None for item in given) != 1:
            raise InputError("give exactly one of prompt, messages, text and token_ids")
        images: Sequence[Any] = request.images
        if request.token_ids is not None:
            processed = [self._process(image) for image in images]
            ids = [int(id) for id in request.token_ids]
        else:
            text, images, from_template = self._text(request)
            processed = [self._process(image) for image in images]
            counts = [self._num_tokens(image) for image in processed]
            text = self.prompts.expand(text, counts)
            ids = self.prompts.encode(text, from_template=from_template)
        self._check(ids)
        grids = [image.grid_thw for image in processed]
        positions, following = self._family.position_ids(ids, grids, self._model)
        return PreparedPrompt(
            ids, self._spans(ids, processed), positions, int(following) - len(ids)
        )

    def _text(self, request: Prompt) -> tuple[str, Sequence[Any], bool]:
        """The prompt with one placeholder per image, its images, and whether a template made it."""
        if request.text is not None:
            return request.text, request.images, False
        messages, images = request.messages, request.images
        if request.prompt is not None:
            if not self.prompts.has_chat_template:
                marks = (self._family.image_placeholder or "") * len(images)
                return marks + request.prompt, images, False
            messages, images = [self.prompts.user_message(request.prompt, images)], ()
        assert messages is not None
        chat, shown = self.prompts.split_images(messages, images)
        options = dict(request.template_options or {})
        return self.prompts.render(chat, tools=request.tools, **options), shown, True

    def _process(self, image: Any) -> ProcessedImage:
        if self._images is None:
            raise InputError(f"a {self._family.name} model takes text only, not images")
        return self._images(image)

    def _num_tokens(self, image: ProcessedImage) -> int:
        assert self._model.vision is not None
        return self._family.image_tokens(image.grid_thw, self._model.vision)

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        limit = self._model.context_length
        if len(ids) >= limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens but the model's context is {limit}, "
                "answer included; shorten the prompt or use smaller images"
            )
        for id in (min(ids), max(ids)):
            if not 0 <= id < self._model.vocab_size:
                raise InputError(
                    f"token id {id} is not in the vocabulary of {self._model.vocab_size} tokens"
                )

    def _spans(self, ids: list[int], images: Sequence[ProcessedImage]) -> tuple[ImageSpan, ...]:
        """Where each image's tokens lie; `position_ids` has checked that they are there."""
        if not images:
            return ()
        places = np.flatnonzero(np.array(ids) == self._model.image_token_id)
        spans, taken = [], 0
        for image in images:
            count = self._num_tokens(image)
            spans.append(ImageSpan(int(places[taken]), count, image))
            taken += count
        return tuple(spans)
