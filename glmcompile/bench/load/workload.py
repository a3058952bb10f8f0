"""What the requests of a load say: messages of given lengths and picture sizes, none twice."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeGuard

import numpy as np

from glmcompile.errors import InputError

Message = dict[str, Any]
_USES = ("request", "system", "probe", "arrivals")


@dataclass(frozen=True)
class Span:
    """A number of tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
    """What each request holds.

    input_tokens: of the user's text; output_tokens: the answer's limit; system_tokens: of a system
    prompt that all requests share. image_sizes: (width, height) in pixels, one drawn for each
    request. conversations: messages to send in place of all that, in turn.
    ignore_eos: ask the server to go on to the limit; vLLM, llama.cpp and glmcompile can.
    """

    input_tokens: Span = Span(256, 256)
    output_tokens: Span = Span(64, 64)
    system_tokens: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()
    conversations: tuple[tuple[Message, ...], ...] = ()
    ignore_eos: bool = False

    def describe(self) -> dict[str, Any]:
        """For a result's JSON; conversations by their number."""
        described = asdict(self)
        described["conversations"] = len(self.conversations)
        if self.conversations:
            for name in ("input_tokens", "system_tokens", "image_sizes"):
                del described[name]
        return described


@dataclass(frozen=True)
class Composer:
    """Writes the requests of a workload; the same seed and index give the same request.

    model: the name to ask for. limit: the field that limits an answer. tokens_per_word: of
    `random_words`, as the server counts.
    """

    workload: Workload
    model: str
    limit: str
    seed: int
    tokens_per_word: float

    def compose(self, index: int) -> bytes:
        """The body of request `index`, ready to be sent."""
        rng = generator(self.seed, "request", index)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(rng, index),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            self.limit: self.workload.output_tokens.draw(rng),
        }
        if self.workload.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    def _messages(self, rng: np.random.Generator, index: int) -> Sequence[Message]:
        workload = self.workload
        if workload.conversations:
            return workload.conversations[index % len(workload.conversations)]
        messages: list[Message] = []
        if workload.system_tokens:
            shared = self._text(workload.system_tokens, generator(self.seed, "system"))
            messages.append({"role": "system", "content": shared})
        text: Any = self._text(workload.input_tokens.draw(rng), rng)
        if workload.image_sizes:
            width, height = workload.image_sizes[rng.integers(len(workload.image_sizes))]
            picture = screen_png(width, height, self.seed, index)
            url = "data:image/png;base64," + base64.b64encode(picture).decode()
            text = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": text},
            ]
        messages.append({"role": "user", "content": text})
        return messages

    def _text(self, tokens: int, rng: np.random.Generator) -> str:
        return random_words(max(1, round(tokens / self.tokens_per_word)), rng)


def generator(seed: int, use: str, index: int = 0) -> np.random.Generator:
    """One of its own for each use ("request", "system", "probe", "arrivals") and index."""
    return np.random.default_rng((seed, _USES.index(use), index))


def random_words(count: int, rng: np.random.Generator) -> str:
    """`count` words of ordinary prose in no order, so that no prompt begins as another does."""
    return " ".join(rng.choice(_words(), count))


@cache
def _words() -> np.ndarray:
    from calibration.texts import texts

    prose = " ".join([*texts("evaluation"), *texts("calibration")]).split()
    # Words of one kind differ least in their tokens, so that lengths are met.
    alike = [word for word in prose if word.isalpha() and word.islower() and 3 <= len(word) <= 7]
    return np.array(alike)


def screen_png(width: int, height: int, seed: int, index: int) -> bytes:
    """A drawn phone screen in the size asked for, as PNG; no two indexes give the same pixels."""
    from PIL import Image

    from calibration.layouts import LAYOUTS
    from calibration.screens import draw

    rng = Random(f"{seed} {index}")
    drawn = draw(rng.choice(LAYOUTS["evaluation"]), rng).image
    image = drawn.resize((width, height), Image.Resampling.BILINEAR)
    # Screens are alike by chance now and then; caches look at all pixels.
    image.putpixel((0, 0), tuple(index.to_bytes(4, "big")[1:]))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_conversations(file: Path) -> tuple[tuple[Message, ...], ...]:
    """Of a JSONL file, whose lines are lists of messages or objects with such a list, `messages`.

    Raises InputError for a file that cannot be read, a line that is neither, and no line at all.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a JSONL file.") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number}: not JSON ({error}).") from error
        messages = found.get("messages") if isinstance(found, dict) else found
        if not _are_messages(messages):
            raise InputError(
                f"{file}, line {number}: a list of messages was expected, each an object with "
                'a role, or {"messages": [...]}.'
            )
        conversations.append(tuple(messages))
    if not conversations:
        raise InputError(f"{file}: holds no conversation; one a line was expected.")
    return tuple(conversations)


def _are_messages(found: Any) -> TypeGuard[list[Message]]:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in found)
    )
