"""A caller's request to what the decoder takes: token ids, image spans, positions, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.contract import Contract
from glmcompile.errors import InputError
from glmcompile.rules import attended_spans, position_ids
from glmcompile.runtime.control_tokens import PromptText
from glmcompile.runtime.image_processor import ProcessedImage, describe, image_processor
from glmcompile.runtime.media import OWN, ImageSource, InputPolicy
from glmcompile.runtime.prompt import Message, PromptBuilder
from glmcompile.runtime.sequence import ImageSpan


@dataclass(frozen=True)
class Prompt:
    """What a caller may give; exactly one of the first four.

    prompt: a user's turn; goes through the chat template where the model has one. Control tokens
        in it are text.
    messages: a chat, in Hugging Face's or OpenAI's form. Control tokens are text in all turns but
        the assistant's.
    text: the whole prompt as text, with one placeholder per image. It is its caller's own: control
        tokens in it are tokens.
    token_ids: the whole prompt as tokens, with one image token per image feature.
    images: shown by `prompt` before its text, by the others at their bare placeholders, in order.
    tools, add_generation_prompt, template_options: for the chat template; the last are further
        names of its own, such as enable_thinking.
    mm_processor_kwargs: {"max_pixels": n} bounds each resized image, where that is below the
        engine's own bound.
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    text: str | None = None
    token_ids: Sequence[int] | None = None
    images: Sequence[Any] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    template_options: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PreparedPrompt:
    """positions: int64 [axes, tokens]; token i after the prompt is at i + position_offset.

    whole: ranges whose tokens see each other.
    """

    token_ids: list[int]
    images: tuple[ImageSpan, ...]
    positions: NDArray[np.int64]
    position_offset: int
    whole: tuple[tuple[int, int], ...] = ()


class InputProcessor:
    """Tokenizer, chat template and image processor of one model directory; safe from any thread."""

    def __init__(self, directory: Path, model: Contract) -> None:
        vision = model.vision
        self.prompts = PromptBuilder(directory, vision.placeholder if vision is not None else None)
        self._model = model
        self._images = image_processor(vision, directory) if vision is not None else None

    def __call__(self, request: Prompt, policy: InputPolicy = OWN) -> PreparedPrompt:
        """Raises InputError naming what cannot be served: an image, a message, the length."""
        given = [request.prompt, request.messages, request.text, request.token_ids]
        if sum(item is not None for item in given) != 1:
            raise InputError("give exactly one of prompt, messages, text and token_ids")
        policy = _with_request_bound(policy, request.mm_processor_kwargs)
        images = [ImageSource(image, f"images[{i}]") for i, image in enumerate(request.images)]
        if request.token_ids is not None:
            ids = _token_ids(request.token_ids)
            processed = self._process(images, policy)
        else:
            text, images = self._text(request, images)
            most = policy.max_characters
            if most is not None and len(text.text) > most:
                raise InputError(
                    f"the prompt has {len(text.text):,} characters; at most {most:,} are taken"
                )
            processed = self._process(images, policy)
            ids = self.prompts.encode(text, [image.token_ids for image in processed])
        self._check(ids)
        grids = [image.grid_thw for image in processed if image.grid_thw]
        positions, following = position_ids(self._model, ids, grids)
        whole = attended_spans(self._model, np.array(ids))
        return PreparedPrompt(
            ids,
            self._spans(ids, processed),
            positions,
            int(following) - len(ids),
            tuple(whole),
        )

    def _text(
        self, request: Prompt, images: list[ImageSource]
    ) -> tuple[PromptText, list[ImageSource]]:
        """The prompt with one placeholder per image, and its images."""
        if request.text is not None:
            return self.prompts.whole(request.text), images
        if request.prompt is not None and not self.prompts.has_chat_template:
            return self.prompts.turn(request.prompt, len(images)), images
        messages: Any = request.messages
        if request.prompt is not None:
            messages, images = [self.prompts.user_message(request.prompt, images)], []
        chat, shown = self.prompts.split_images(messages, images)
        prompt = self.prompts.chat(
            chat,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            options=request.template_options,
        )
        return prompt, shown

    def _process(self, images: Sequence[ImageSource], policy: InputPolicy) -> list[ProcessedImage]:
        if images and self._images is None:
            raise InputError(f"{self._model.architecture} takes text only, not images")
        vision = self._model.vision
        if len(images) > 1 and vision is not None and vision.processor.arguments.get("single"):
            raise InputError(
                f"{len(images)} images were given; an image of this model depends on the others "
                "of its prompt, so that a request may show one"
            )
        if policy.max_images is not None and len(images) > policy.max_images:
            raise InputError(
                f"{len(images)} images were given; a request may show {policy.max_images}"
            )
        if policy.open_paths:  # a program's own paths help it to find the image
            images = [_with_description(image) for image in images]
        return [self._images(image, policy) for image in images] if self._images else []

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
        """Where each image's tokens lie."""
        if not images:
            return ()
        places = np.flatnonzero(np.array(ids) == self._model.image_token_id)
        spans, taken = [], 0
        for image in images:
            own = places[taken : taken + image.num_tokens]
            taken += image.num_tokens
            if len(own) < image.num_tokens:
                raise InputError(
                    f"the prompt has {len(places)} image tokens but its images take "
                    f"{sum(each.num_tokens for each in images)}; expand each image placeholder to "
                    "its image's tokens"
                )
            first, length = int(own[0]), int(own[-1]) + 1 - int(own[0])
            spans.append(ImageSpan(first, length, image, own if length > len(own) else None))
        return tuple(spans)


def _with_description(image: ImageSource) -> ImageSource:
    return replace(image, where=f"{image.where} ({describe(image.source)})")


def _with_request_bound(policy: InputPolicy, options: Mapping[str, Any] | None) -> InputPolicy:
    """The policy with a request's own max_pixels, which can lower its bound and not raise it."""
    if options is None:
        return policy
    if not isinstance(options, Mapping) or set(options) - {"max_pixels"}:
        raise InputError(f"mm_processor_kwargs: expected {{'max_pixels': n}}, not {options!r:.80}")
    pixels = options.get("max_pixels")
    if pixels is None:
        return policy
    if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
        raise InputError(
            f"mm_processor_kwargs: max_pixels is {pixels!r:.40}; expected an integer above 0"
        )
    return replace(policy, max_pixels=min(pixels, policy.max_pixels or pixels))


def _token_ids(ids: Any) -> list[int]:
    """Integers as they are; other things are refused, floats and booleans among them."""
    if isinstance(ids, str | bytes | Mapping) or not hasattr(ids, "__len__"):
        raise InputError(f"token_ids: expected a list of integers, not {type(ids).__name__}")
    made = []
    for place, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, int | np.integer):
            raise InputError(f"token_ids[{place}]: expected an integer, not {id!r:.40}")
        made.append(int(id))
    return made
