"""Control tokens in prompts: which of them are meant, and how those that are text are encoded.

A chat template writes control tokens (`<|user|>`, an image's placeholder) as text, between strings
that came from anybody. So that a string can forge none, each is rendered with the letters of
control tokens exchanged for lone surrogates, which no text may hold; what is a control token in the
result was written by the template.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from glmcompile.errors import InputError

Span = tuple[int, int]

_FIRST_MARK = 0xD800  # of the 2,048 lone surrogates


@dataclass(frozen=True)
class PromptText:
    """A prompt before tokenization.

    text: with one placeholder per image.
    controls: where in it control tokens stand, in order; what looks like one elsewhere is text.
    from_template: whether a chat template wrote it.
    """

    text: str
    controls: tuple[Span, ...]
    from_template: bool = False

    def tokens(self) -> list[str]:
        """The control tokens, in order."""
        return [self.text[start:stop] for start, stop in self.controls]


class ControlTokens:
    """The control tokens of one tokenizer: its special added tokens and the image placeholder.

    Added tokens that are not special (`<think>`) are words like others: people write them in
    prompts on purpose. Safe from any thread.
    """

    def __init__(self, tokenizer: Tokenizer, placeholder: str | None) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        controls = [
            token
            for token in added
            if token.content and (token.special or token.content == placeholder)
        ]
        self._tokenizer = tokenizer
        self._tokens = sorted({token.content for token in controls}, key=len, reverse=True)
        # A normalizer can turn other text into a control token that it is applied to.
        self._normalized = tokenizer.normalizer is not None and any(
            token.normalized for token in controls
        )
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._placeholder = placeholder if placeholder in self._tokens else None
        alphabet = sorted(set("".join(self._tokens)))
        self._marks = {ord(letter): _FIRST_MARK + i for i, letter in enumerate(alphabet)}
        self._letters = {mark: letter for letter, mark in self._marks.items()}
        self._lock = threading.Lock()
        self._renamed: tuple[Tokenizer, dict[str, str]] | None = None

    def find(self, text: str) -> tuple[Span, ...]:
        """Where control tokens stand in a text whose author may write them."""
        return tuple(match.span() for match in self._pattern.finditer(text))

    def as_text(self, text: str) -> str:
        """Mark each control token in a text as no token; for `read`."""
        return self._pattern.sub(lambda match: self._marked(match[0]), text)

    def without_images(self, text: str) -> str:
        """Mark image placeholders alone; for `read`."""
        if self._placeholder is None:
            return text
        return text.replace(self._placeholder, self._marked(self._placeholder))

    def masked(self, text: str) -> str:
        """Mark every letter that any control token has, so that no part of one is left."""
        return text.translate(self._marks)

    def read(self, marked: str, *, from_template: bool = False) -> PromptText:
        """Take the marks out of a text; what control tokens it holds with them are meant."""
        controls = self.find(marked)
        text = marked if marked.isascii() else marked.translate(self._letters)
        return PromptText(text, controls, from_template)

    def encode(
        self, prompt: PromptText, image_tokens: Sequence[Sequence[int]], *, add_special_tokens: bool
    ) -> list[int]:
        """Token ids, each image placeholder replaced by the tokens of its image.

        Where all that looks like a control token is one, they are the tokenizer's own ids.
        Raises InputError when the prompt has more or fewer placeholders than there are images.
        """
        found = prompt.tokens().count(self._placeholder) if self._placeholder else 0
        if found != len(image_tokens):
            raise InputError(
                f"the prompt has {found} image placeholders and {len(image_tokens)} images were "
                f"given; write {self._placeholder} once for each image"
            )
        tokenizer, text = self._tokenizer, prompt.text
        if self._normalized or prompt.controls != self.find(text):
            tokenizer, names = self._renamed_tokenizer()
            pieces, end = [], 0
            for start, stop in prompt.controls:
                pieces += [text[end:start], names[text[start:stop]]]
                end = stop
            text = "".join([*pieces, text[end:]])
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._with_images(ids, image_tokens) if image_tokens else ids

    def _with_images(self, ids: list[int], images: Sequence[Sequence[int]]) -> list[int]:
        """Ids with each placeholder replaced: the same as those of the replaced text, but quicker,
        as an added token never depends on its neighbours."""
        assert self._placeholder is not None  # `encode` has counted as many as there are images
        image = self._tokenizer.token_to_id(self._placeholder)
        assert image is not None
        replaced, end = [], 0
        for tokens in images:
            start = ids.index(image, end)
            replaced += ids[end:start]
            replaced += tokens
            end = start + 1
        return replaced + ids[end:]

    def _marked(self, token: str) -> str:
        return chr(self._marks[ord(token[0])]) + token[1:]

    def _renamed_tokenizer(self) -> tuple[Tokenizer, dict[str, str]]:
        """A tokenizer whose control tokens have names that nobody can write, and these names.

        To it the usual names are text. Made when first needed, as it takes a second tokenizer's
        time and memory, which requests that hold no control tokens need not pay.
        """
        with self._lock:
            if self._renamed is None:
                secret = secrets.token_hex(8)
                names = {token: f"\ufdd0{secret}:{i}\ufdd1" for i, token in enumerate(self._tokens)}
                renamed = _rename(json.loads(self._tokenizer.to_str()), names)
                self._renamed = Tokenizer.from_str(json.dumps(renamed)), names
            return self._renamed


def _rename(settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json with added tokens renamed, in the model's vocabulary, too; ids are kept."""
    for token in settings["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:  # Unigram: pairs of token and score, whose places are the ids
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return settings
